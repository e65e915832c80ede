import MooncakeSystem

/// The segments, closed ones included, with slices that may wait for a fresh descriptor. A segment
/// stays until it was removed as often as it was added.
final class RecoveringSegments: Sendable {
  private struct Item {
    let segment: OpenSegment
    var count: Int
  }
  private let items = Lock<[ObjectIdentifier: Item]>([:])

  func add(_ segment: OpenSegment) {
    items.withLock {
      $0[ObjectIdentifier(segment), default: Item(segment: segment, count: 0)].count += 1
    }
  }

  func remove(_ segment: OpenSegment) {
    items.withLock { items in
      let key = ObjectIdentifier(segment)
      guard let item = items[key] else { return }
      if item.count == 1 { items[key] = nil } else { items[key]!.count -= 1 }
    }
  }

  var all: [OpenSegment] { items.withLock { $0.values.map(\.segment) } }
}
