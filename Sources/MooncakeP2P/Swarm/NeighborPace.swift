/// What is being read from a holder, how fast it comes, and how long nothing has come.
struct NeighborPace: Sendable {
  /// Shards that are being read.
  private(set) var readCount = 0
  /// Granted bytes that have not arrived.
  private(set) var pendingBytes: UInt64 = 0
  /// Bytes a second while it sends; nil if nothing was measured yet.
  private(set) var speed: Double?
  /// When bytes were last counted: those of a slice count once all of it has arrived.
  private(set) var lastCount: UInt64 = 0
  /// Probes since the latest progress.
  private(set) var probeCount = 0
  private var lastProgress: UInt64 = 0
  /// Usual time between two reports of progress.
  private var usualGap: UInt64 = 0
  private var sampleStart: UInt64 = 0
  private var sampleBytes: UInt64 = 0

  private static let sampleNanoseconds: UInt64 = 20_000_000
  /// Weight of the newest sample in the speed.
  private static let sampleWeight = 0.3
  /// Weight of the usual gap against the newest one.
  private static let gapWeight: UInt64 = 3
  private static let stallNanoseconds: UInt64 = 250_000_000
  /// A silence of so many usual gaps is suspicious, within `stallFactorLimit`.
  private static let stallGaps: UInt64 = 4
  private static let stallFactorLimit: UInt64 = 4
  private static let stallDoublingLimit = 5

  /// When silence becomes suspicious; each answered probe doubles the patience.
  var stallTime: UInt64 {
    let patience = min(
      max(Self.stallNanoseconds, usualGap * Self.stallGaps),
      Self.stallFactorLimit * Self.stallNanoseconds)
    return lastProgress &+ patience << UInt64(min(probeCount, Self.stallDoublingLimit))
  }

  func hasProgressed(since time: UInt64) -> Bool { lastProgress > time }

  mutating func beginRead(_ bytes: UInt64, now: UInt64) {
    if readCount == 0 {
      lastProgress = now
      lastCount = now
      probeCount = 0
      sampleStart = now
      sampleBytes = 0
    }
    readCount += 1
    pendingBytes += bytes
  }

  mutating func noteProbe() { probeCount += 1 }

  /// Bytes have arrived; 0 if none of them can be counted yet.
  mutating func progress(_ bytes: UInt64, now: UInt64) {
    noteSignOfLife(now)
    if bytes == 0 { return }
    pendingBytes -= min(pendingBytes, bytes)
    lastCount = now
    sampleBytes &+= bytes
    let span = now &- sampleStart
    if span < Self.sampleNanoseconds { return }
    let sample = Double(sampleBytes) * 1e9 / Double(span)
    speed = speed.map { $0 * (1 - Self.sampleWeight) + sample * Self.sampleWeight } ?? sample
    sampleStart = now
    sampleBytes = 0
  }

  private mutating func noteSignOfLife(_ now: UInt64) {
    let gap = now &- lastProgress
    usualGap = usualGap == 0 ? gap : (usualGap * Self.gapWeight + gap) / (Self.gapWeight + 1)
    lastProgress = now
    probeCount = 0
  }

  /// A read has ended. Shards arrive one after the other, so what is still pending belongs to the
  /// reads that are left.
  mutating func endRead(_ shardBytes: UInt64, isWhole: Bool, now: UInt64) {
    assert(readCount > 0, "nothing is being read")
    readCount -= 1
    let left = UInt64(readCount) * shardBytes
    let arrived = pendingBytes > left ? pendingBytes - left : 0
    if isWhole { progress(arrived, now: now) }
    pendingBytes = min(pendingBytes, left)
  }
}
