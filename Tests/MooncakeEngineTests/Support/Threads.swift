import MooncakeSystem
import Synchronization

/// Runs `body` on several threads at once and waits for them.
func onThreads(_ count: Int, _ body: @escaping @Sendable (Int) -> Void) throws {
  let threads = try (0..<count).map { index in
    try WorkerThread.start(name: "test\(index)") { body(index) }
  }
  for thread in threads { thread.join() }
}

/// Failures on other threads: the testing library attributes them only on a test's own thread.
final class Complaints: Sendable {
  private let texts = Lock<[String]>([])

  var all: [String] { texts.withLock { $0 } }

  func add(_ text: @autoclosure () -> String) {
    let text = text()
    texts.withLock { $0.append(text) }
  }

  func require(_ condition: Bool, _ text: @autoclosure () -> String) {
    if !condition { add(text()) }
  }

  /// Records a failure if `body` throws.
  func check(_ what: String, _ body: () throws -> Void) {
    do { try body() } catch { add("\(what): \(error)") }
  }
}

/// Milliseconds that `body` takes.
func elapsedMilliseconds(_ body: () throws -> Void) rethrows -> UInt64 {
  let start = Clock.now()
  try body()
  return (Clock.now() - start) / 1_000_000
}
