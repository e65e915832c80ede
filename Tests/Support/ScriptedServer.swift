import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// A server that answers each request as a test says. A request is whatever comes at once, or,
/// where it looks like HTTP, a whole request of that.
package final class ScriptedServer: @unchecked Sendable {
  // Unchecked: the acceptor is written once before the object is shared.
  package enum Reply {
    case text(String)
    case bytes([UInt8])
    /// An HTTP answer.
    case http(Int, String)
    /// Closes the connection without an answer.
    case close
    /// Answers, then closes the connection.
    case last(String)
    /// Does not answer, and waits for the client to close.
    case silence
  }

  package struct Request: Sendable {
    package let text: String
    /// Which connection it came on, counted from 0.
    package let connection: Int
  }

  package let port: UInt16
  private let listener: Socket
  private let wakeup: EventFD
  private let seen = Lock<[Request]>([])
  private let connections = Lock<[FakeConnection]>([])
  private let isStopping = Atomic(false)
  private var threads: [WorkerThread] = []
  private var acceptor: WorkerThread?
  private let script: @Sendable (Request) -> Reply

  package init(_ script: @escaping @Sendable (Request) -> Reply) throws {
    self.script = script
    wakeup = try EventFD()
    listener = try makeListener()
    port = try listener.localAddress().port
    acceptor = try WorkerThread.start(name: "scripted") { [unowned self] in accept() }
  }

  deinit { stop() }

  /// Every request so far.
  package var requests: [Request] { seen.withLock { $0 } }

  package func requestCount(_ word: String) -> Int { requests.count { $0.text.contains(word) } }

  package func stop() {
    guard let acceptor else { return }
    isStopping.store(true, ordering: .releasing)
    wakeup.signal()
    acceptor.join()
    self.acceptor = nil
    for connection in connections.withLock({ $0 }) { connection.finish() }
    for thread in threads { thread.join() }
  }

  private func accept() {
    while !isStopping.load(ordering: .acquiring) {
      var items = [
        pollfd(fd: listener.rawValue, events: Int16(POLLIN), revents: 0),
        pollfd(fd: wakeup.descriptor.rawValue, events: Int16(POLLIN), revents: 0),
      ]
      _ = poll(&items, 2, -1)
      guard let socket = try? listener.accept() else { continue }
      let connection = FakeConnection(socket, index: threads.count)
      connections.withLock { $0.append(connection) }
      let thread = try? WorkerThread.start(name: "scripted-conn") { [unowned self] in
        serve(connection)
        connection.finish()
      }
      if let thread { threads.append(thread) }
    }
  }

  private func serve(_ connection: FakeConnection) {
    var text = ""
    while let byte = connection.receive(1) {
      text += String(decoding: byte, as: UTF8.self)
      if connection.hasMore(within: 0) || !Self.isWhole(text) { continue }
      let request = Request(text: text, connection: connection.index)
      text = ""
      seen.withLock { $0.append(request) }
      switch script(request) {
      case .text(let answer): connection.send(Array(answer.utf8))
      case .bytes(let answer): connection.send(answer)
      case .http(let status, let body):
        let head = "HTTP/1.1 \(status) Said\r\nContent-Length: \(body.utf8.count)\r\n\r\n"
        connection.send(Array((head + body).utf8))
      case .close: return
      case .last(let answer): return connection.send(Array(answer.utf8))
      case .silence: return connection.awaitClose()
      }
    }
  }

  private static func isWhole(_ text: String) -> Bool {
    guard text.contains(" HTTP/1.1\r\n") else { return true }
    guard let end = text.firstRange(of: "\r\n\r\n") else { return false }
    let lines = text[..<end.lowerBound].lowercased().split(separator: "\r\n")
    let length = lines.first { $0.hasPrefix("content-length:") }
      .flatMap { Int($0.dropFirst(15).drop { $0 == " " }) }
    return text[end.upperBound...].utf8.count >= length ?? 0
  }
}
