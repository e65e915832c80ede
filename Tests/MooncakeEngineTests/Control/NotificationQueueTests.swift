import MooncakeEngine
import MooncakeSystem
import Testing

struct NotificationQueueTests {
  @Test func firstInFirstOut() {
    let queue = NotificationQueue()
    for index in 0..<100 {
      #expect(queue.append(Notification(name: "n\(index)", message: "m")) == nil)
      if index % 3 == 2 { #expect(queue.takeFirst()?.name == "n\(index / 3)") }
    }
    #expect(queue.count == 67)
    #expect(queue.takeAll().map(\.name) == (33..<100).map { "n\($0)" })
    #expect(queue.takeFirst() == nil)
    #expect(queue.takeAll().isEmpty)
  }

  @Test func numberIsBounded() {
    let queue = NotificationQueue(maximumCount: 2)
    let message = Notification(name: "", message: "")
    #expect(queue.append(message) == nil)
    #expect(queue.append(message) == nil)
    #expect(queue.append(message)?.contains("full") == true)
    #expect(queue.takeFirst() == message)
    #expect(queue.append(message) == nil)
  }

  @Test func bytesAreBounded() {
    let queue = NotificationQueue(maximumBytes: 10)
    #expect(queue.append(Notification(name: "12345", message: "12345")) == nil)
    #expect(queue.append(Notification(name: "1", message: "")) != nil)
    #expect(queue.append(Notification(name: "", message: "")) == nil)
    #expect(queue.takeFirst()?.name == "12345")
    #expect(queue.append(Notification(name: "12345678901", message: "")) != nil)
    #expect(queue.append(Notification(name: "1234567890", message: "")) == nil)
  }

  @Test func manyThreads() throws {
    let queue = NotificationQueue(maximumCount: .max)
    let threads = try (0..<4).map { thread in
      try WorkerThread.start(name: "test") {
        for index in 0..<1000 {
          _ = queue.append(Notification(name: "\(thread)", message: "\(index)"))
        }
      }
    }
    var next = [0, 0, 0, 0]
    var taken = 0
    let deadline = Deadline.after(milliseconds: 10_000)
    while taken < 4000 && !deadline.hasPassed {
      guard let message = queue.takeFirst() else { continue }
      let thread = Int(message.name)!
      #expect(message.message == "\(next[thread])")
      next[thread] += 1
      taken += 1
    }
    for thread in threads { thread.join() }
    #expect(taken == 4000)
  }
}
