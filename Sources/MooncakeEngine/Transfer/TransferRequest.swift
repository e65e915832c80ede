import MooncakeBase

/// Direction of a transfer, seen from the initiator.
public enum Opcode: Int32, Sendable {
  /// Fills local memory from the target.
  case read = 0
  /// Sends local memory to the target.
  case write = 1
}

/// Names an opened segment within its engine; 0 is the engine's own.
public typealias SegmentID = Int32

/// Names a batch within its engine.
public typealias BatchID = UInt64

/// One range to move between local memory and a buffer of a target segment.
public struct TransferRequest {
  public var opcode: Opcode
  public var segment: SegmentID
  /// Filled by a read, sent by a write; must stay valid until the request is terminal.
  public var source: UnsafeMutableRawPointer?
  /// Address inside one buffer of the target segment.
  public var targetOffset: UInt64
  /// Bytes.
  public var length: UInt64

  public init(
    opcode: Opcode, segment: SegmentID, source: UnsafeMutableRawPointer?, targetOffset: UInt64,
    length: UInt64
  ) {
    self.opcode = opcode
    self.segment = segment
    self.source = source
    self.targetOffset = targetOffset
    self.length = length
  }
}

/// A request from outside, with nothing checked yet.
package struct RawRequest {
  package var opcode: Int32
  package var segment: SegmentID
  package var source: UInt64
  package var targetOffset: UInt64
  package var length: UInt64

  package init(
    opcode: Int32, segment: SegmentID, source: UInt64, targetOffset: UInt64, length: UInt64
  ) {
    self.opcode = opcode
    self.segment = segment
    self.source = source
    self.targetOffset = targetOffset
    self.length = length
  }

  package init(_ request: TransferRequest) {
    self.init(
      opcode: request.opcode.rawValue, segment: request.segment,
      source: UInt64(UInt(bitPattern: request.source)), targetOffset: request.targetOffset,
      length: request.length)
  }
}

/// Where a request or batch stands. Raw values are the `MOONCAKE_STATE_*` constants.
public enum TransferState: Int32, Sendable {
  case waiting = 0
  case canceled = 3
  case completed = 4
  case timeout = 5
  case failed = 6

  public var isTerminal: Bool { self != .waiting }
}

/// Status of one request.
public struct TransferStatus: Sendable, Equatable {
  public var state: TransferState
  /// Why it did not complete; nil while waiting and when completed.
  public var error: MooncakeError.Code?
  public var transferredBytes: UInt64
}

/// Status of a whole batch; see `mooncake_batch_status_t`.
public struct BatchStatus: Sendable, Equatable {
  public var state: TransferState
  public var error: MooncakeError.Code?
  public var submittedCount: UInt64
  public var completedCount: UInt64
  public var terminalCount: UInt64
  public var transferredBytes: UInt64
}

/// A message between engines.
public struct Notification: Sendable, Equatable {
  public var name: String
  public var message: String

  public init(name: String, message: String) {
    self.name = name
    self.message = message
  }

  /// What fits into one RPC message together with the JSON around it.
  package static let byteLimit = HandshakeSettings.fromEnvironment().maximumLength - (8 << 10)

  package func validate() throws(MooncakeError) {
    let count = name.utf8.count + message.utf8.count
    if count > Self.byteLimit {
      throw MooncakeError(
        .invalidArgument,
        "the notification has \(count) bytes, more than the \(Self.byteLimit) that peers take")
    }
  }
}
