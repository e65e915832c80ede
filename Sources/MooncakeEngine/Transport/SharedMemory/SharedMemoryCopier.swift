import CLinux
import Glibc
import MooncakeSystem
import Synchronization

/// Copies of one thread between this process and one peer: only a few, because the owners of the
/// memory may have to wait for all of them.
///
/// Mapped memory is copied with plain loads and stores if the local side is registered too, since
/// then both sides are known to be mapped. Everything else goes through the kernel, which checks
/// addresses itself.
struct SharedMemoryCopier: ~Copyable {
  /// How a copy ended.
  enum Outcome { case done, refused, canceled, late }

  private let peer: SharedMemoryPeer
  private let own: SharedMemoryPeer
  private var view: SharedMemoryPeer.View
  private var ownView: SharedMemoryPeer.View
  private let rseq: UnsafeMutableRawPointer?
  /// 0 if the whole is so small that it should stay in the caches.
  private let vectorBytes: Int32
  private var slot: CopySlots.Occupied
  private var ownSlot: CopySlots.Occupied

  /// Bytes copied at once, and between two checks for cancellation.
  static let pieceBytes = 1 << 20

  @inline(__always)
  init(_ peer: SharedMemoryPeer, own: SharedMemoryPeer, vectorBytes: Int32) {
    self.peer = peer
    self.own = own
    self.vectorBytes = vectorBytes
    rseq = linux_rseq_area()
    // Slots first, then the guards in the views: see `CopySlots`.
    slot = peer.slots.enter(isGuarded: rseq != nil)
    ownSlot = own.slots.enter(isGuarded: rseq != nil)
    view = peer.currentView()
    ownView = own.currentView()
  }

  deinit {
    CopySlots.leave(ownSlot)
    CopySlots.leave(slot)
  }

  /// Lets owners that wait for the slots continue.
  private mutating func pause() {
    CopySlots.leave(ownSlot)
    CopySlots.leave(slot)
    slot = peer.slots.enter(isGuarded: rseq != nil)
    ownSlot = own.slots.enter(isGuarded: rseq != nil)
    view = peer.currentView()
    ownView = own.currentView()
  }

  /// The guard's value for which the latest look-up holds.
  @inline(__always)
  var guardValue: UInt64 { view.guardValue }

  /// The kernel's copy of many ranges that were looked up when the guard had the value `expected`.
  @inline(__always)
  func copyByKernel(
    _ opcode: Opcode, _ local: UnsafePointer<iovec>, _ remote: UnsafePointer<iovec>, count: Int,
    expected: UInt64
  ) -> Int {
    linux_guarded_kernel_copy(
      opcode == .write ? 1 : 0, peer.process.id, local, remote, UInt(count), peer.guardWord,
      expected, rseq)
  }

  // MARK: One range

  /// How a range can be copied now.
  enum Method {
    case mapped(UnsafeMutableRawPointer)
    case kernel
    case none
  }

  @inline(__always)
  mutating func method(
    for opcode: Opcode, _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Method {
    var index = view.ranges.find(remote, UInt64(count))
    if index < 0 {
      view = peer.viewAfterMiss(view)
      index = view.ranges.find(remote, UInt64(count))
    }
    guard index >= 0 else { return .none }
    let range = view.ranges.buffers[index]
    guard range.access.contains(opcode.requiredAccess) else { return .none }
    if let base = UnsafeMutableRawPointer(bitPattern: view.bases[index]),
      isRegistered(local, count)
    {
      return .mapped(base + Int(remote &- range.address))
    }
    return peer.copiesByKernel ? .kernel : .none
  }

  private mutating func isRegistered(_ local: UnsafeMutableRawPointer, _ count: Int) -> Bool {
    let address = UInt64(UInt(bitPattern: local))
    if ownView.ranges.find(address, UInt64(count)) >= 0 { return true }
    ownView = own.viewAfterMiss(ownView)
    return ownView.ranges.find(address, UInt64(count)) >= 0
  }

  /// Copies one piece, at most `pieceBytes`; false if it must go another way.
  @inline(__always)
  mutating func copyPiece(
    _ opcode: Opcode, _ local: UnsafeMutableRawPointer, _ remote: UInt64, _ count: Int
  ) -> Bool {
    while peer.isUsable {
      var left = count
      let result: Int
      switch method(for: opcode, local, remote, count) {
      case .none: return false
      case .mapped(let mapped):
        let (target, source) = opcode == .read ? (local, mapped) : (mapped, local)
        result = linux_guarded_copy(
          target + count, source + count, &left, vectorBytes, peer.guardWord, view.guardValue, rseq)
        if result == 0 { return true }
      case .kernel:
        var localVector = iovec(iov_base: local, iov_len: count)
        var remoteVector = iovec(
          iov_base: UnsafeMutableRawPointer(bitPattern: UInt(remote)), iov_len: count)
        result = copyByKernel(
          opcode, &localVector, &remoteVector, count: 1, expected: view.guardValue)
        if result == count { return true }
      }
      guard mayRetry(after: result) else { return false }
    }
    return false
  }

  /// Whether a copy that did not finish may be tried again; if not, it must go another way.
  mutating func mayRetry(after result: Int) -> Bool {
    switch result {
    case Int(LINUX_COPY_CHANGED):
      pause()
      return true
    case Int(LINUX_COPY_INTERRUPTED):
      return peer.checkAlive()
    case -Int(ESRCH), -Int(EPERM), -Int(ENOSYS):
      peer.stopKernelCopies(Errno(Int32(-result)))
      return false
    default: return false
    }
  }

  /// Copies one range of any size.
  mutating func copy(_ slice: SlicePointer) -> Outcome {
    let count = slice.pointee.length
    let opcode = slice.pointee.opcode
    if count <= Self.pieceBytes {
      let isDone = copyPiece(opcode, slice.pointee.local, slice.pointee.remote, count)
      return isDone ? .done : .refused
    }
    // Nothing of a range may move before all of it was checked.
    if case .none = method(for: opcode, slice.pointee.local, slice.pointee.remote, count) {
      return .refused
    }
    var offset = 0
    while offset < count {
      if slice.pointee.batch.isCancelRequested { return .canceled }
      if slice.pointee.deadline <= Clock.now() { return .late }
      if offset > 0 { pause() }
      let piece = min(Self.pieceBytes, count - offset)
      guard
        copyPiece(
          opcode, slice.pointee.local + offset, slice.pointee.remote &+ UInt64(offset), piece)
      else { return .refused }
      offset += piece
    }
    return .done
  }
}
