import MooncakeBase
import MooncakeSystem
import Synchronization

/// A way to move memory between an engine and its peers: what all of them have in common. There is
/// one object for each engine that uses the way; it owns the threads and serves the peers.
package protocol Transport: AnyObject, Sendable {
  /// As options, messages and metrics call it.
  var name: String { get }

  /// Adds to the engine's descriptor what peers need in order to reach it, and to use the buffers
  /// that are listed there. Runs again whenever they have changed.
  func describe(in descriptor: inout SegmentDescriptor)

  /// Most bytes that `describe` adds to the descriptor's text for each buffer.
  var describedBytesPerBuffer: Int { get }

  /// Paths to the process that has published a descriptor, at least one. Of `former`, the paths to
  /// an earlier descriptor of the same name, those that lead to the same place are kept. Throws the
  /// reason if this way does not lead to that process.
  func connect(
    to descriptor: SegmentDescriptor, former: [any Path], for link: SegmentLink, deadline: Deadline
  ) throws(MooncakeError) -> [any Path]

  /// Whether peers can map memory that the engine allocates; such memory is asked of it first.
  var memory: (any MappableMemory)? { get }

  /// Offers buffers to peers; what cannot be registered is not offered. They are in the table
  /// already, unless they were removed meanwhile: whoever keeps something for each looks there
  /// under the lock under which `revoke` takes it back.
  func offer(_ new: [BufferTable.Buffer])

  /// Takes removed buffers back from peers. Once this returns nil, no peer touches them through
  /// this transport. Returns who is still in the middle of a copy at the end of the call.
  func revoke(_ buffers: [BufferTable.Buffer], until call: Call) -> String?

  var totals: TransportTotals { get }

  /// What it counts besides, for the metrics.
  var metrics: [TransportCounter] { get }

  /// Ends every slice as canceled, then connections and threads. Returns who is still in the middle
  /// of a copy when the deadline has passed.
  func stop(until deadline: Deadline) -> String?
}

extension Transport {
  package var describedBytesPerBuffer: Int { 0 }
  package var memory: (any MappableMemory)? { nil }
  package func offer(_ new: [BufferTable.Buffer]) {}
}

/// Allocates memory that peers can map.
package protocol MappableMemory: AnyObject, Sendable {
  /// nil if there is none at present.
  func allocate(byteCount: Int, node: UInt32?) -> EngineMemory?
  func release(_ memory: EngineMemory)
}

/// What every transport counts.
package struct TransportTotals: Sendable {
  package var readBytes: UInt64 = 0
  package var writtenBytes: UInt64 = 0
  package var completedSlices: UInt64 = 0
  package var failedSlices: UInt64 = 0

  package init() {}

  init(
    readBytes: borrowing Atomic<UInt64>, writtenBytes: borrowing Atomic<UInt64>,
    completedSlices: borrowing Atomic<UInt64>, failedSlices: borrowing Atomic<UInt64>
  ) {
    self.readBytes = readBytes.load(ordering: .relaxed)
    self.writtenBytes = writtenBytes.load(ordering: .relaxed)
    self.completedSlices = completedSlices.load(ordering: .relaxed)
    self.failedSlices = failedSlices.load(ordering: .relaxed)
  }
}

/// One line of the metrics.
package struct TransportCounter: Sendable {
  package enum Kind: String, Sendable { case counter, gauge }
  package let name: String
  package let kind: Kind
  package let help: String
  package let value: UInt64

  package init(_ name: String, _ help: String, _ value: UInt64, kind: Kind = .counter) {
    self.name = name
    self.help = help
    self.value = value
    self.kind = kind
  }
}

/// What an engine gives to the transports that it starts.
package struct TransportContext: Sendable {
  /// The engine's registrations.
  package var buffers: BufferTable
  package var drivers: DriverTable
  package var gates: WriteGates
  /// Where peers connect, and what it listens on.
  package var address: ListenAddress
  package var threadCount: Int
  package var connectionsPerPeer: Int
  package var spinNanoseconds: UInt64
  /// Where its threads run; nil for anywhere.
  package var processors: ProcessorSet?
  /// Becomes readable when the engine closes.
  package var cancellation: Int32
  /// Runs on a thread that may wait; false if there is none.
  package var background: @Sendable (@escaping @Sendable () -> Void) -> Bool

  package init(
    buffers: BufferTable, drivers: DriverTable, gates: WriteGates, address: ListenAddress,
    threadCount: Int, connectionsPerPeer: Int, spinNanoseconds: UInt64, processors: ProcessorSet?,
    cancellation: Int32,
    background: @escaping @Sendable (@escaping @Sendable () -> Void) -> Bool
  ) {
    self.buffers = buffers
    self.drivers = drivers
    self.gates = gates
    self.address = address
    self.threadCount = threadCount
    self.connectionsPerPeer = connectionsPerPeer
    self.spinNanoseconds = spinNanoseconds
    self.processors = processors
    self.cancellation = cancellation
    self.background = background
  }
}
