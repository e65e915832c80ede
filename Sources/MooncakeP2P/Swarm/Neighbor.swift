/// A holder as a receiver knows it.
struct Neighbor: Sendable {
  let address: HolderAddress
  var isOrigin: Bool
  /// Sent a shard that did not match its digest: never asked again.
  var isBanned = false
  /// Whether a shard of its matched the digest.
  var isProven = false
  /// Whether it has answered a question before the first about shards.
  var isKnown = false
  /// Its reads have been canceled and not all have ended.
  var isDropped = false
  /// Dropped for its silence, and no byte has come since.
  var isMute = false
  /// What the ask on its way is for; nil: none is.
  var asked: Ask?
  /// Not to be asked for shards before.
  var nextAsk: UInt64 = 0
  /// Answers in a row without a grant.
  var refusals = 0
  /// Failures in a row.
  var failures = 0
  /// nil: it never answered.
  var heldCount: Int?
  /// Whether it said last that others come first.
  var putsOff = false
  var readerCount = 0
  /// Shards that are being read from it.
  var readCount = 0
  /// Granted bytes that have not arrived.
  var pendingBytes: UInt64 = 0
  /// Whether it counts grants, or may, that are not used any more.
  var isOwedWord = false
  /// When the lease of its grants wants renewal.
  var renewal: UInt64 = .max
  /// Bytes a second while it sends; nil: nothing measured.
  var speed: Double?
  var lastProgress: UInt64 = 0
  /// When bytes were counted last: those of a slice count once all of it is there.
  var lastCount: UInt64 = 0
  /// Usual time between two reports of progress.
  private var usualGap: UInt64 = 0
  /// Probes since the last progress.
  var probes = 0
  private var sampleStart: UInt64 = 0
  private var sampleBytes: UInt64 = 0

  struct Ask: Sendable {
    var limit: Int
    /// The shard that is to be moved to this holder.
    var moving: Int?
    var since: UInt64
  }

  init(_ address: HolderAddress, isOrigin: Bool) {
    self.address = address
    self.isOrigin = isOrigin
  }

  var isAsking: Bool { asked != nil }
  var isActive: Bool { isAsking || readCount > 0 }
  var isAlive: Bool { !isBanned && failures == 0 }

  mutating func beginRead(_ bytes: UInt64, now: UInt64) {
    if readCount == 0 {
      lastProgress = now
      lastCount = now
      probes = 0
      sampleStart = now
      sampleBytes = 0
    }
    readCount += 1
    pendingBytes += bytes
  }

  /// Bytes come, of which none can be counted yet: it lives, and its speed is not known better.
  mutating func hear(now: UInt64) {
    let gap = now &- lastProgress
    usualGap = usualGap == 0 ? gap : (usualGap * 3 + gap) / 4
    lastProgress = now
    probes = 0
  }

  mutating func progress(_ bytes: UInt64, now: UInt64) {
    hear(now: now)
    if bytes == 0 { return }
    pendingBytes -= min(pendingBytes, bytes)
    lastCount = now
    sampleBytes &+= bytes
    let span = now &- sampleStart
    if span < Self.sampleNanoseconds { return }
    let sample = Double(sampleBytes) * 1e9 / Double(span)
    speed = speed.map { $0 * 0.7 + sample * 0.3 } ?? sample
    sampleStart = now
    sampleBytes = 0
  }

  /// A read has ended. Shards arrive one after the other, so what is still pending belongs to those
  /// left.
  mutating func endRead(_ shardBytes: UInt64, isWhole: Bool, now: UInt64) {
    readCount -= 1
    if readCount == 0 { isDropped = false }
    let left = UInt64(readCount) * shardBytes
    let arrived = pendingBytes > left ? pendingBytes - left : 0
    if isWhole { progress(arrived, now: now) }
    pendingBytes = min(pendingBytes, left)
  }

  /// When its silence becomes suspicious; each probe that it answered doubles the patience.
  var stallTime: UInt64 {
    let patience = min(max(Self.stallNanoseconds, usualGap * 4), 4 * Self.stallNanoseconds)
    return lastProgress &+ patience << UInt64(min(probes, 5))
  }

  private static let stallNanoseconds: UInt64 = 250_000_000
  private static let sampleNanoseconds: UInt64 = 20_000_000
}
