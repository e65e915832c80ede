/// Scheduled events, earliest first; equal times in the order of scheduling.
struct EventQueue<Event> {
  private struct Entry {
    let time: UInt64
    let order: UInt64
    let event: Event

    func isBefore(_ other: Entry) -> Bool {
      time != other.time ? time < other.time : order < other.order
    }
  }

  private var heap: [Entry] = []
  private var order: UInt64 = 0

  mutating func add(_ event: Event, at time: UInt64) {
    order += 1
    heap.append(Entry(time: time, order: order, event: event))
    var child = heap.count - 1
    while child > 0 {
      let parent = (child - 1) / 2
      if !heap[child].isBefore(heap[parent]) { return }
      heap.swapAt(child, parent)
      child = parent
    }
  }

  mutating func next() -> (time: UInt64, event: Event)? {
    guard let first = heap.first else { return nil }
    let last = heap.removeLast()
    if heap.isEmpty { return (first.time, first.event) }
    heap[0] = last
    var parent = 0
    while true {
      var least = parent
      for child in [2 * parent + 1, 2 * parent + 2]
      where child < heap.count && heap[child].isBefore(heap[least]) { least = child }
      if least == parent { return (first.time, first.event) }
      heap.swapAt(least, parent)
      parent = least
    }
  }
}
