import CLinux
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// Another process of this host, or another engine of this process: its table, the memory of it
/// that is mapped here, and the slots in which this engine announces its copies.
package final class SharedMemoryPeer: @unchecked Sendable {
  // Unchecked: everything is set in `init` or synchronized.

  /// A memory file of the peer, mapped here as long as anybody uses it.
  final class Memory: Sendable {
    let mapping: MemoryMapping
    let isWritable: Bool

    init(_ mapping: consuming MemoryMapping, isWritable: Bool) {
      self.mapping = mapping
      self.isWritable = isWritable
    }
  }

  /// What the peer has registered, valid as long as the guard has `guardValue`.
  package final class View: Sendable {
    let guardValue: UInt64
    let version: UInt64
    let ranges: RangeTable
    /// Where each range begins in this process; 0 if it is not mapped here.
    let bases: [UInt]
    private let memories: [UInt32: Memory]

    init(
      guardValue: UInt64, version: UInt64, ranges: [RemoteBuffer], bases: [UInt],
      memories: [UInt32: Memory]
    ) {
      self.guardValue = guardValue
      self.version = version
      self.ranges = RangeTable(ranges)
      self.bases = bases
      self.memories = memories
    }

    static let empty = View(guardValue: .max, version: .max, ranges: [], bases: [], memories: [:])
  }

  let process: ProcessHandle
  let socket: LocalSocket
  let slots: CopySlots
  /// The loop's name for it.
  let token = Atomic<UInt64>(0)
  private let table: SharedTableReader
  private let gone = Atomic<Bool>(false)
  private let kernelCopies: Atomic<Bool>
  private let viewBox = Lock<View>(.empty)
  private let memories = Lock<[UInt32: Memory]>([:])
  private let description: String

  private static let greetingMilliseconds: UInt64 = 5_000
  /// An owner offers up to 256 at once, and a few more while it replaces some.
  private static let memoryLimit = 1024
  /// Notices read before the loop turns to other peers.
  private static let noticeLimit = 64

  /// Connects to a descriptor's server and tests whether the kernel copies between the processes.
  init(
    to name: String, segmentName: String, deadline: Deadline, cancellation: Int32
  ) throws(Errno) {
    let deadline = min(deadline, .after(milliseconds: Self.greetingMilliseconds))
    socket = try LocalSocket.connected(to: name)
    let owner = try socket.credentials()
    guard owner.user == geteuid(), owner.process > 0 else { throw Errno(EPERM) }
    process = try ProcessHandle(owner.process)
    description = "shared memory: process \(owner.process) (segment \(segmentName))"

    try socket.waitReadable(until: deadline, cancellation: cancellation)
    var greeting = SharedMemoryLayout.Greeting(magic: 0)
    var files = try Self.receive(socket, into: &greeting)
    guard greeting.magic == SharedMemoryLayout.magic, files.count == 2 else {
      throw Errno(EPROTO)
    }
    table = try SharedTableReader(
      MemoryFile(receiving: files.take(0), byteCount: SharedMemoryLayout.tableBytes))
    slots = try CopySlots(
      MemoryFile(receiving: files.take(1), byteCount: SharedMemoryLayout.slotsBytes))
    // Checked once connected, so that a later process with this number is not taken for the owner.
    if process.hasEnded { throw Errno(ESRCH) }
    kernelCopies = Atomic(Self.probe(owner.process, greeting))
    for _ in 0..<min(greeting.memoryCount, UInt64(Self.memoryLimit)) {
      try socket.waitReadable(until: deadline, cancellation: cancellation)
      try receiveNotice()
    }
    refresh()
    Log.debug(
      "\(description): connected\(copiesByKernel ? "" : "; the kernel does not copy between us")")
  }

  /// Descriptors received with a message; closes those that are not taken.
  private struct Received: ~Copyable {
    private var descriptors: [Int32]

    init(_ descriptors: [Int32]) { self.descriptors = descriptors }

    deinit { for descriptor in descriptors where descriptor >= 0 { close(descriptor) } }

    var count: Int { descriptors.count }

    mutating func take(_ index: Int) -> FileDescriptor {
      defer { descriptors[index] = -1 }
      return FileDescriptor(owning: descriptors[index])
    }
  }

  /// Receives a message of exactly one value.
  private static func receive<Message: BitwiseCopyable>(
    _ socket: borrowing LocalSocket, into message: inout Message
  ) throws(Errno) -> Received {
    let (count, descriptors) = try withUnsafeMutableBytes(of: &message) { bytes throws(Errno) in
      try socket.receive(bytes)
    }
    let received = Received(descriptors)
    if count == 0 { throw Errno(ECONNRESET) }
    if count != MemoryLayout<Message>.size { throw Errno(EPROTO) }
    return received
  }

  private static func probe(_ process: pid_t, _ greeting: SharedMemoryLayout.Greeting) -> Bool {
    var value: UInt64 = 0
    return withUnsafeMutableBytes(of: &value) { bytes in
      var local = iovec(iov_base: bytes.baseAddress, iov_len: 8)
      var remote = iovec(
        iov_base: UnsafeMutableRawPointer(bitPattern: UInt(greeting.probeAddress)), iov_len: 8)
      return process_vm_readv(process, &local, 1, &remote, 1, 0) == 8
        && bytes.loadUnaligned(as: UInt64.self) == greeting.probeValue
    }
  }

  // MARK: State

  @inline(__always)
  package var isUsable: Bool { !gone.load(ordering: .relaxed) }

  @inline(__always)
  package var copiesByKernel: Bool { kernelCopies.load(ordering: .relaxed) }

  @inline(__always)
  var guardWord: UnsafeRawPointer { table.guardWord }

  /// Takes the peer out of use: its process has ended or hung up.
  package func leave() {
    if gone.exchange(true, ordering: .sequentiallyConsistent) { return }
    Log.debug("\(description): gone")
    memories.withLock { memories in
      memories.removeAll()
      viewBox.withLock { $0 = .empty }
    }
    // Last, because it tells the owner that no copy begins any more; those that have begun hold
    // slots. It also wakes the loop, which drops the peer.
    _ = shutdown(socket.rawValue, Int32(SHUT_RDWR))
  }

  /// Stops using kernel copies after a refusal.
  func stopKernelCopies(_ error: Errno) {
    if error.rawValue == ESRCH { return leave() }
    if !kernelCopies.exchange(false, ordering: .relaxed) { return }
    Log.info("\(description): the kernel does not copy between us: \(error)")
  }

  /// Checked after an interruption of unknown length, so that nothing is written to a later process
  /// with the same number.
  func checkAlive() -> Bool {
    if process.hasEnded { leave() }
    return isUsable
  }

  // MARK: The table

  /// What is registered now.
  @inline(__always)
  package func currentView() -> View {
    let view = viewBox.withLock { $0 }
    return view.guardValue == table.guardValue ? view : refresh()
  }

  /// The view to try after a look-up failed in `view`: the range may be new.
  func viewAfterMiss(_ view: View) -> View {
    table.version == view.version ? view : refresh()
  }

  /// Whether the peer has registered a slice's range for it.
  package func grants(_ slice: SlicePointer, _ view: View) -> Bool {
    let length = UInt64(slice.pointee.length)
    let right = slice.pointee.opcode.requiredAccess
    if view.ranges.check(slice.pointee.remote, length, right) == .allowed { return true }
    return viewAfterMiss(view).ranges.check(slice.pointee.remote, length, right) == .allowed
  }

  @discardableResult
  func refresh() -> View {
    memories.withLock { memories in
      guard isUsable, let (guardValue, version, entries) = table.read() else { return .empty }
      var ranges: [RemoteBuffer] = []
      var bases: [UInt] = []
      ranges.reserveCapacity(entries.count)
      bases.reserveCapacity(entries.count)
      var end: UInt64 = 0
      for entry in entries {
        // Whatever the table says, no copy may leave the mapped memory.
        let (next, overflow) = entry.address.addingReportingOverflow(entry.length)
        guard entry.length > 0, !overflow, entry.address >= end else { continue }
        end = next
        ranges.append(
          RemoteBuffer(
            address: entry.address, length: entry.length, access: Access(rawValue: entry.access)))
        bases.append(Self.base(of: entry, memories))
      }
      let view = View(
        guardValue: guardValue, version: version, ranges: ranges, bases: bases, memories: memories)
      viewBox.withLock { $0 = view }
      return view
    }
  }

  private static func base(
    of entry: SharedMemoryLayout.Entry, _ memories: [UInt32: Memory]
  ) -> UInt {
    guard entry.memory != 0, let memory = memories[entry.memory] else { return 0 }
    let size = UInt64(memory.mapping.count)
    guard entry.memoryOffset <= size, entry.length <= size - entry.memoryOffset else { return 0 }
    if Access(rawValue: entry.access).contains(.remoteWrite) && !memory.isWritable { return 0 }
    return UInt(bitPattern: memory.mapping.address) + UInt(entry.memoryOffset)
  }

  // MARK: Notices

  /// Reads what the owner has sent; the loop calls it.
  func receiveNotices() {
    do throws(Errno) {
      var count = 0
      while isUsable && count < Self.noticeLimit {
        try receiveNotice()
        count += 1
      }
      refresh()
    } catch {
      if error == .wouldBlock {
        refresh()
      } else {
        Log.info("\(description): \(error); it is reached over TCP")
        leave()
      }
    }
  }

  private func receiveNotice() throws(Errno) {
    var notice = SharedMemoryLayout.Notice(kind: 0, memory: 0)
    var files = try Self.receive(socket, into: &notice)
    switch notice.kind {
    case SharedMemoryLayout.Notice.offered where files.count == 1 && notice.byteCount <= Int.max:
      let file = try MemoryFile(receiving: files.take(0), byteCount: Int(notice.byteCount))
      let isWritable = notice.isWritable != 0
      // What cannot be mapped is used like ordinary memory.
      guard let mapping = try? file.map(writable: isWritable) else { return }
      let memory = Memory(mapping, isWritable: isWritable)
      let isTaken = memories.withLock { memories in
        if memories.count >= Self.memoryLimit && memories[notice.memory] == nil { return false }
        memories[notice.memory] = memory
        return true
      }
      if !isTaken { throw Errno(EPROTO) }
    case SharedMemoryLayout.Notice.withdrawn:
      memories.withLock { $0[notice.memory] = nil }
    default: throw Errno(EPROTO)
    }
  }
}
