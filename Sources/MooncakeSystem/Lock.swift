import Synchronization

#if DEBUG
  /// A mutex that holds what it protects.
  ///
  /// The standard library's `Mutex` waits inside a library that the thread sanitizer does not see,
  /// so a contended one looks like a race. The atomic tells the sanitizer the order.
  package struct Lock<Value: ~Copyable>: ~Copyable, Sendable {
    private let mutex: Mutex<Value>
    private let order = Atomic(false)

    package init(_ value: consuming sending Value) { mutex = Mutex(value) }

    /// Runs `body` while no other thread is inside.
    package func withLock<Result: ~Copyable, Failure: Error>(
      _ body: (inout sending Value) throws(Failure) -> sending Result
    ) throws(Failure) -> sending Result {
      try mutex.withLock { value throws(Failure) in
        _ = order.load(ordering: .acquiring)
        defer { order.store(true, ordering: .releasing) }
        return try body(&value)
      }
    }
  }
#else
  /// A mutex that holds what it protects. The standard library's own is inlined where it is used;
  /// the wrapper of debug builds would look up metadata at each call.
  package typealias Lock<Value: ~Copyable> = Mutex<Value>
#endif
