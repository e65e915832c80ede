import MooncakeSystem

/// Work that waits for a thread, which may come too late: then its end is told at its deadline
/// instead.
final class LateWork: Sendable {
  private struct Item: Sendable {
    let deadline: UInt64
    let isLate: @Sendable () -> Void
  }
  private struct State {
    var items: [UInt64: Item] = [:]
    var nextToken: UInt64 = 0
    /// When those whose deadline has passed are looked for next.
    var watched = UInt64.max
  }
  private let caller: RPCCaller
  private let state = Lock(State())

  /// What lies closer together is told together.
  private static let watchNanoseconds: UInt64 = 10_000_000

  init(_ caller: RPCCaller) { self.caller = caller }

  /// Adds work that `take` must take away before it is done; else `isLate`, which must not wait, is
  /// called once its deadline has passed.
  func add(until deadline: UInt64, isLate: @escaping @Sendable () -> Void) -> UInt64 {
    let (token, watch): (UInt64, UInt64?) = state.withLock { state in
      state.nextToken += 1
      state.items[state.nextToken] = Item(deadline: deadline, isLate: isLate)
      // A watch that is over without having looked could not be begun.
      if deadline >= state.watched && state.watched > Clock.now() { return (state.nextToken, nil) }
      state.watched = deadline
      return (state.nextToken, deadline)
    }
    self.watch(until: watch)
    return token
  }

  /// Whether the work is still to be done.
  func take(_ token: UInt64) -> Bool {
    state.withLock { $0.items.removeValue(forKey: token) != nil }
  }

  private func watch(until deadline: UInt64?) {
    guard let deadline else { return }
    caller.run(at: Deadline(nanoseconds: deadline)) { [weak self] in self?.tellLate() }
  }

  private func tellLate() {
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
