import MooncakeBase
import MooncakeSystem

extension TransferEngine {
  /// Delivers a notification to the owner of a segment.
  public func notify(
    _ segment: SegmentID, _ notification: Notification, timeoutMilliseconds: UInt64 = 0
  ) throws(EngineError) {
    try checkOpen()
    try notification.validate()
    let name = try segments.segment(segment).name
    try logged { () throws(EngineError) in
      let deadline = deadline(timeoutMilliseconds)
      try RPCClient.notify(
        rpcAddress(of: name, deadline: deadline), notification, deadline: deadline,
        cancellation: closeEvent.descriptor.rawValue)
    }
  }

  /// Takes the oldest notification received.
  public func receiveNotification() -> Notification? { notifications.takeFirst() }
}
