/// A clock that stands still between events, and the events to come.
final class VirtualTime: @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  private struct Event {
    let time: UInt64
    let body: () -> Void
  }

  /// Nanoseconds; not 0 at the start, since that is a time which nothing has happened at yet.
  private(set) var now: UInt64 = 1_000_000_000
  /// The latest first; of equal times, the one that was added last.
  private var events: [Event] = []
  /// Runs after every event.
  var afterEach: () -> Void = {}

  /// Forgets what was to come, and who waits for it.
  func end() {
    events = []
    afterEach = {}
  }

  func at(_ time: UInt64, _ body: @escaping () -> Void) {
    let time = max(time, now)
    var low = 0
    var high = events.count
    while low < high {
      let middle = (low + high) / 2
      if events[middle].time > time { low = middle + 1 } else { high = middle }
    }
    events.insert(Event(time: time, body: body), at: low)
  }

  func after(_ nanoseconds: UInt64, _ body: @escaping () -> Void) { at(now + nanoseconds, body) }

  /// Runs the events up to a time, which it is then. May be called by an event, so that others
  /// happen while that one lasts.
  func run(until end: UInt64) {
    while let next = events.last, next.time <= end {
      events.removeLast()
      now = max(now, next.time)
      next.body()
      afterEach()
    }
    now = max(now, end)
  }

  /// Runs the events up to a time while a condition holds; returns whether none is left.
  func runAll(until end: UInt64, while isWanted: () -> Bool) -> Bool {
    while let next = events.last, next.time <= end, isWanted() { run(until: next.time) }
    return events.isEmpty
  }
}
