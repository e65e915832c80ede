import MooncakeSystem
import Synchronization

/// Notifications received and not yet taken: first in, first out, bounded in number and bytes.
package final class NotificationQueue: Sendable {
  package static let maximumCount = 4096
  package static let maximumBytes = 64 << 20

  private struct State {
    var messages: [Notification?] = []
    var head = 0
    var byteCount = 0
  }

  private let maximumCount: Int
  private let maximumBytes: Int
  private let state = Lock(State())

  package init(
    maximumCount: Int = NotificationQueue.maximumCount,
    maximumBytes: Int = NotificationQueue.maximumBytes
  ) {
    self.maximumCount = maximumCount
    self.maximumBytes = maximumBytes
  }

  /// Messages waiting.
  package var count: Int { state.withLock { $0.messages.count - $0.head } }

  /// Appends a message; returns nil, or why it was refused.
  package func append(_ notification: Notification) -> String? {
    let size = Self.size(of: notification)
    return state.withLock { state in
      if state.messages.count - state.head >= maximumCount {
        return "the notification queue is full (\(maximumCount) messages not yet taken)"
      }
      if size > maximumBytes - state.byteCount {
        return "the notification queue is full (\(state.byteCount) of \(maximumBytes) bytes taken)"
      }
      state.messages.append(notification)
      state.byteCount += size
      return nil
    }
  }

  /// Takes the oldest message; nil if there is none.
  package func takeFirst() -> Notification? {
    state.withLock { state in
      guard state.head < state.messages.count, let first = state.messages[state.head] else {
        return nil
      }
      state.messages[state.head] = nil
      state.head += 1
      state.byteCount -= Self.size(of: first)
      // Moving the rest only when it is the smaller half keeps taking cheap on average.
      if state.head * 2 >= state.messages.count {
        state.messages.removeFirst(state.head)
        state.head = 0
      }
      return first
    }
  }

  /// Takes every message in order.
  package func takeAll() -> [Notification] {
    state.withLock { state in
      let all = state.messages[state.head...].compactMap { $0 }
      state = State()
      return all
    }
  }

  private static func size(of notification: Notification) -> Int {
    notification.name.utf8.count + notification.message.utf8.count
  }
}
