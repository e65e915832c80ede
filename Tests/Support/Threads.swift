import MooncakeSystem
import Synchronization

/// Runs `body` on threads of their own, all at once, and waits for them.
package func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) throws {
  let threads = try (0..<count).map { index in
    try WorkerThread.start(name: "test\(index)") { body(index) }
  }
  for thread in threads { thread.join() }
}

/// Complaints of other threads: the testing library knows a test only by the thread that runs it.
package final class Complaints: Sendable {
  private let texts = Lock<[String]>([])

  package init() {}

  package var all: [String] { texts.withLock { $0 } }

  package func add(_ text: @autoclosure () -> String) {
    let text = text()
    texts.withLock { $0.append(text) }
  }

  package func require(_ condition: Bool, _ text: @autoclosure () -> String) {
    if !condition { add(text()) }
  }

  /// Complains if `body` throws.
  package func check(_ what: String, _ body: () throws -> Void) {
    do { try body() } catch { add("\(what): \(error)") }
  }
}

/// A value that threads share.
package final class Box<Value: Sendable>: Sendable {
  private let box: Lock<Value>

  package init(_ value: Value) { box = Lock(value) }

  package var value: Value {
    get { box.withLock { $0 } }
    set { box.withLock { $0 = newValue } }
  }

  package func update(_ body: (inout Value) -> Void) { box.withLock { body(&$0) } }
}
