import MooncakeSystem

/// The watches of one store that still run.
package final class PayloadWatches: Sendable {
  private struct State: Sendable {
    var loops: [ObjectIdentifier: PayloadWatchLoop] = [:]
    var isClosed = false
  }
  private let state = Lock(State())

  package init() {}

  /// Starts the thread of a watch; false, and nothing runs, once all have been ended.
  func start(_ loop: PayloadWatchLoop) throws(Errno) -> Bool {
    try state.withLock { state throws(Errno) in
      if state.isClosed { return false }
      try loop.start()
      state.loops[ObjectIdentifier(loop)] = loop
      return true
    }
  }

  /// Ends one watch. Its handler does not run when this returns, unless it is the caller.
  func stop(_ loop: PayloadWatchLoop) {
    loop.requestStop()
    if loop.isCurrent {
      loop.detach()
    } else {
      loop.waitUntilEnded()
    }
    state.withLock { $0.loops[ObjectIdentifier(loop)] = nil }
  }

  /// Ends all watches, and those to come.
  func close() {
    let loops = state.withLock { state in
      state.isClosed = true
      return Array(state.loops.values)
    }
    for loop in loops { loop.requestStop() }
    for loop in loops { stop(loop) }
  }

  /// Whether the caller is a handler of one of them.
  var isCurrent: Bool { state.withLock { $0.loops.values.contains { $0.isCurrent } } }
}
