import MooncakeBase
import MooncakeSystem

extension TransferEngine {
  /// Delivers a notification to the owner of a segment.
  public func notify(
    _ segment: SegmentID, _ notification: Notification, timeoutMilliseconds: UInt64 = 0
  ) throws(MooncakeError) {
    try checkOpen()
    try notification.validate()
    let name = try segments.segment(segment).name
    try logged { () throws(MooncakeError) in
      let call = call(until: deadline(timeoutMilliseconds))
      try RPCClient.notify(rpcAddress(of: name, call), notification, call)
    }
  }

  /// Takes the oldest notification received.
  public func receiveNotification() -> Notification? { notifications.takeFirst() }
}
