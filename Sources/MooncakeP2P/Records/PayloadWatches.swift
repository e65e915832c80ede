import MooncakeSystem

/// The running watches of one store.
package final class PayloadWatches: Sendable {
  private struct State: Sendable {
    var loops: [ObjectIdentifier: PayloadWatchLoop] = [:]
    var isClosed = false
  }
  private let state = Lock(State())

  package init() {}

  /// Starts the thread of a watch; returns false and starts nothing once all have been ended.
  func start(_ loop: PayloadWatchLoop) throws(Errno) -> Bool {
    try state.withLock { state throws(Errno) in
      if state.isClosed { return false }
      // It leaves the table when its last handler has returned, whoever has ended it.
      try loop.start { [self] in self.state.withLock { $0.loops[ObjectIdentifier(loop)] = nil } }
      state.loops[ObjectIdentifier(loop)] = loop
      return true
    }
  }

  /// Ends one watch. Its handler is not running when this returns, unless a handler calls this: two
  /// handlers that waited for each other would wait forever.
  func stop(_ loop: PayloadWatchLoop) {
    loop.requestStop()
    if isCurrent { loop.detach() } else { loop.waitUntilEnded() }
  }

  /// Ends all watches and refuses new ones; waits for all handlers but the caller.
  func close() {
    let loops = state.withLock { state in
      state.isClosed = true
      return Array(state.loops.values)
    }
    for loop in loops { loop.requestStop() }
    for loop in loops {
      if loop.isCurrent { loop.detach() } else { loop.waitUntilEnded() }
    }
  }

  /// Whether the caller is running in one of their handlers.
  var isCurrent: Bool { state.withLock { $0.loops.values.contains { $0.isCurrent } } }
}
