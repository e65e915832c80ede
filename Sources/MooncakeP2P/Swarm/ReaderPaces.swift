/// How fast the receivers were that lately had grants: a slow one that comes for another turn is
/// known as slow from the start, and keeps nobody else from a place.
struct ReaderPaces: Sendable {
  private struct Pace {
    var reader: UInt64
    /// Nanoseconds a shard.
    var nanoseconds: Double
    var time: UInt64
  }
  private var paces: [Pace] = []

  private static let limit = 128
  private static let lifeNanoseconds: UInt64 = 60_000_000_000

  /// Replaces what was known of the reader or, if there are too many, the oldest entry.
  mutating func remember(_ reader: UInt64, _ nanoseconds: Double, _ now: UInt64) {
    let pace = Pace(reader: reader, nanoseconds: nanoseconds, time: now)
    if let known = paces.firstIndex(where: { $0.reader == reader }) {
      paces[known] = pace
    } else if paces.count < Self.limit {
      paces.append(pace)
    } else if let oldest = paces.indices.min(by: { paces[$0].time < paces[$1].time }) {
      paces[oldest] = pace
    }
  }

  func pace(of reader: UInt64, _ now: UInt64) -> Double? {
    guard let known = paces.first(where: { $0.reader == reader }),
      now &- known.time < Self.lifeNanoseconds
    else { return nil }
    return known.nanoseconds
  }
}
