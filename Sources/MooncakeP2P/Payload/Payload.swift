import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Identifies the bytes of a payload: the digest of its manifest.
public struct PayloadVersion: Hashable, Sendable, CustomStringConvertible {
  public let high: UInt64
  public let low: UInt64

  public init(high: UInt64, low: UInt64) {
    self.high = high
    self.low = low
  }

  /// 32 hexadecimal digits.
  public var description: String { Self.digits(high) + Self.digits(low) }

  /// Reads what `description` wrote; nil for anything else.
  public init?(_ text: String) {
    guard text.utf8.count == 32, text.utf8.allSatisfy({ $0 != UInt8(ascii: "+") }),
      let high = UInt64(text.prefix(16), radix: 16), let low = UInt64(text.suffix(16), radix: 16)
    else { return nil }
    self.init(high: high, low: low)
  }

  private static func digits(_ number: UInt64) -> String {
    let text = String(number, radix: 16)
    return String(repeating: "0", count: 16 - text.count) + text
  }
}

/// A range of the caller's memory that holds, or will hold, part of a payload.
public struct PayloadBuffer: @unchecked Sendable {
  // Unchecked: the caller decides who touches the bytes.
  public var address: UnsafeMutableRawPointer
  /// Bytes.
  public var length: UInt64

  public init(address: UnsafeMutableRawPointer, length: UInt64) {
    self.address = address
    self.length = length
  }
}

/// What is known of a payload without asking its holders.
public struct PayloadInfo: Sendable, Equatable {
  public var name: String
  /// nil: registered by Mooncake's store, without digests.
  public var version: PayloadVersion?
  /// Bytes of all buffers.
  public var size: UInt64
  /// Bytes of a shard; the last one of a buffer may be shorter.
  public var shardBytes: UInt64
  public var shardCount: UInt64
  /// Length of each buffer, in order; empty if only the manifest has it.
  public var bufferSizes: [UInt64]
  /// When this version was registered, milliseconds since 1970; 0 if unknown.
  public var publishedMilliseconds: UInt64
  /// Whether peers may write into it; if so, it has no digests and one holder.
  public var isWritable: Bool
  public var holderCount: UInt64

  public init(
    name: String, version: PayloadVersion?, size: UInt64, shardBytes: UInt64, shardCount: UInt64,
    bufferSizes: [UInt64] = [], publishedMilliseconds: UInt64 = 0, isWritable: Bool = false,
    holderCount: UInt64 = 0
  ) {
    self.name = name
    self.version = version
    self.size = size
    self.shardBytes = shardBytes
    self.shardCount = shardCount
    self.bufferSizes = bufferSizes
    self.publishedMilliseconds = publishedMilliseconds
    self.isWritable = isWritable
    self.holderCount = holderCount
  }
}

/// A process that offers a payload, or part of it.
public struct PayloadHolder: Sendable, Equatable {
  /// The segment whose memory it is in.
  public var segment: String
  public var version: PayloadVersion?
  /// Whether it registered the payload itself (gold) or fetched it (replica).
  public var isOrigin: Bool
  public var isComplete: Bool

  public init(segment: String, version: PayloadVersion?, isOrigin: Bool, isComplete: Bool) {
    self.segment = segment
    self.version = version
    self.isOrigin = isOrigin
    self.isComplete = isComplete
  }
}

/// How a payload is registered.
public struct RegisterOptions: Sendable {
  /// Bytes per shard; 0 chooses by the payload's size.
  public var shardBytes: UInt64 = 0
  /// The device closest to the memory, such as "cpu:0"; "*" lets the engine find out.
  public var location = "*"
  /// Fails if the name is taken, instead of making a new version.
  public var isCreateOnly = false
  /// Peers may write into it in place: it has no digests and is never offered onward.
  public var isWritable = false
  /// Carried in the manifest, uninterpreted.
  package var attributes: [UInt8] = []

  public init() {}
}

/// How a payload is fetched.
public struct GetOptions: Sendable {
  /// Only this version; nil: the current one.
  public var version: PayloadVersion?
  /// If the name gets another version meanwhile and nobody holds the old one any more, starts over
  /// with the new one instead of failing.
  public var followsVersions = false
  /// Offers shards to others as they arrive, and the whole afterwards until the replica is deleted.
  public var sharesOnward = true
  /// Where the engine allocates memory, if it does.
  public var location = "*"

  public init() {}
}

/// What a `get` did.
public struct GetResult: Sendable {
  public var info: PayloadInfo
  /// Where the payload is: the caller's buffers, or memory that `deleteReplica` frees.
  public var buffers: [PayloadBuffer]
  /// Whether every shard matched its digest; false for a payload without digests.
  public var isVerified: Bool
  public var nanoseconds: UInt64
  /// Bytes from each holder, by segment name.
  public var sources: [Source]
  /// The publisher's uninterpreted bytes.
  package var attributes: [UInt8] = []

  public struct Source: Sendable, Equatable {
    public var segment: String
    public var isOrigin: Bool
    public var byteCount: UInt64
    /// Shards that did not match their digests.
    public var corruptShardCount: UInt64
  }
}

/// How far a long operation has come.
public struct StoreProgress: Sendable, Equatable {
  public enum Phase: Int32, Sendable {
    case locating = 0
    case hashing = 1
    case transferring = 2
    case publishing = 3
    case draining = 4
  }
  public var phase: Phase
  public var doneBytes: UInt64
  public var totalBytes: UInt64
  /// Holders that bytes are coming from now.
  public var activeHolderCount: Int
  /// Holders known.
  public var holderCount: Int
}

extension StoreProgress {
  /// A phase in which no bytes come from holders.
  package init(_ phase: Phase, doneBytes: UInt64 = 0, totalBytes: UInt64 = 0) {
    self.init(
      phase: phase, doneBytes: doneBytes, totalBytes: totalBytes, activeHolderCount: 0,
      holderCount: 0)
  }
}

/// What bounds and watches one operation.
public struct StoreOperation: Sendable {
  /// 0: the engine's default for calls that ask the metadata service, no limit for `get` and
  /// `register`.
  public var timeoutMilliseconds: UInt64 = 0
  /// Called on the caller's thread at the start of a phase, otherwise at most ten times a second;
  /// false cancels.
  public var progress: (@Sendable (StoreProgress) -> Bool)?
  public var cancellation: Cancellation?

  public init(timeoutMilliseconds: UInt64 = 0) { self.timeoutMilliseconds = timeoutMilliseconds }
}

/// Ends the operations that were given it, from any thread.
public final class Cancellation: Sendable {
  package let event: EventFD

  public init() throws(MooncakeError) {
    do throws(Errno) { event = try EventFD() } catch {
      throw MooncakeError(.system, "making a cancellation: \(error)")
    }
  }

  /// Every running operation with it soon throws `canceled`; later ones do so at once.
  public func cancel() { event.signal() }
}
