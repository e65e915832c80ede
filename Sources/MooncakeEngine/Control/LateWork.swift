import MooncakeSystem

/// Work that waits for a thread. If none takes it by its deadline, it is reported as late then.
final class LateWork: Sendable {
  private struct Item: Sendable {
    let deadline: UInt64
    let isLate: @Sendable () -> Void
  }
  private struct State {
    var items: [UInt64: Item] = [:]
    var nextToken: UInt64 = 0
    /// When to look for overdue items next.
    var watched = UInt64.max
  }
  private let caller: RPCCaller
  private let state = Lock(State())

  /// Items whose deadlines are closer together than this are reported together.
  private static let watchNanoseconds: UInt64 = 10_000_000

  init(_ caller: RPCCaller) { self.caller = caller }

  /// Adds work; whoever is to do it must first `take` it. If that has not happened by the deadline,
  /// `isLate`, which must not wait, is called once.
  func add(until deadline: UInt64, isLate: @escaping @Sendable () -> Void) -> UInt64 {
    let (token, watch): (UInt64, UInt64?) = state.withLock { state in
      state.nextToken += 1
      state.items[state.nextToken] = Item(deadline: deadline, isLate: isLate)
      // A watch whose time has passed without a look could not be started; start another.
      if deadline >= state.watched && state.watched > Clock.now() { return (state.nextToken, nil) }
      state.watched = deadline
      return (state.nextToken, deadline)
    }
    self.watch(until: watch)
    return token
  }

  /// Takes the work off the list; false if it was already reported as late.
  func take(_ token: UInt64) -> Bool {
    state.withLock { $0.items.removeValue(forKey: token) != nil }
  }

  private func watch(until deadline: UInt64?) {
    guard let deadline else { return }
    caller.run(at: Deadline(nanoseconds: deadline)) { [weak self] in self?.reportLate() }
  }

  private func reportLate() {
    let now = Clock.now()
    let (late, watch): ([Item], UInt64?) = state.withLock { state in
      if now < state.watched { return ([], nil) }
      let late = state.items.filter { $0.value.deadline <= now }
      for token in late.keys { state.items[token] = nil }
      let next = state.items.values.map(\.deadline).min()
      state.watched = next.map { max($0, now &+ Self.watchNanoseconds) } ?? .max
      return (Array(late.values), next == nil ? nil : state.watched)
    }
    for item in late { item.isLate() }
    self.watch(until: watch)
  }
}
