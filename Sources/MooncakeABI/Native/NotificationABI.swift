// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Notifications" of mooncake.h.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine

/// Delivers a notification to the owner of a segment.
@c @implementation
package func mooncake_notification_send(
  _ engine: OpaquePointer?, _ segment: mooncake_segment_t, _ name: UnsafePointer<CChar>?,
  _ message: UnsafePointer<CChar>?, _ timeout_ms: UInt64
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    try engine.notify(
      segment, try makeNotification(name, message), timeoutMilliseconds: timeout_ms)
  }
}

/// Takes the oldest notification received.
@c @implementation
package func mooncake_notification_receive(
  _ engine: OpaquePointer?,
  _ notification: UnsafeMutablePointer<UnsafeMutablePointer<mooncake_notification_t>?>?
) -> Int32 {
  nativeCall(engine) { engine throws(MooncakeError) in
    let output = try checkOutput(notification, "notification")
    guard let received = engine.receiveNotification() else {
      output.pointee = nil
      return
    }
    output.pointee = try copyOut(received)
  }
}

/// Frees a notification.
@c @implementation
package func mooncake_notification_free(
  _ notification: UnsafeMutablePointer<mooncake_notification_t>?
) {
  free(notification)
}

/// Checks and copies the two texts of a notification.
func makeNotification(
  _ name: UnsafePointer<CChar>?, _ message: UnsafePointer<CChar>?
) throws(MooncakeError) -> Notification {
  Notification(
    name: try messageText(name, "name", maximum: maximumNameBytes),
    message: try messageText(message, "message"))
}

/// Copies struct and texts into one block, so that a single free() releases it.
private func copyOut(
  _ notification: Notification
) throws(MooncakeError) -> UnsafeMutablePointer<mooncake_notification_t> {
  let headerSize = MemoryLayout<mooncake_notification_t>.size
  let nameSize = notification.name.utf8.count + 1
  let messageSize = notification.message.utf8.count + 1
  guard let block = malloc(headerSize + nameSize + messageSize) else {
    throw MooncakeError(
      .outOfMemory, "no memory for a notification of \(messageSize) bytes; it is lost")
  }
  let name = (block + headerSize).assumingMemoryBound(to: CChar.self)
  let message = name + nameSize
  writePrefix(of: notification.name, name, nameSize)
  writePrefix(of: notification.message, message, messageSize)
  let header = block.bindMemory(to: mooncake_notification_t.self, capacity: 1)
  header.initialize(to: mooncake_notification_t(name: name, message: message))
  return header
}
