import CLinux
import Glibc
import MooncakeSystem

/// Slices for one peer that one thread copies and ends. Consecutive ones that the kernel copies
/// share a system call.
struct SharedMemoryRun: ~Copyable {
  /// What could not be copied; the caller sends it another way.
  private(set) var refused = SliceQueue()
  private var copier: SharedMemoryCopier
  private let localVectors: UnsafeMutablePointer<iovec>
  private let remoteVectors: UnsafeMutablePointer<iovec>
  private var pending = SliceQueue()
  private var pendingBytes = 0
  private var pendingOpcode = Opcode.read
  /// The guard's value when the pending slices were looked up. The copier's view may be newer by
  /// the time they are copied: other slices pause, and an owner may take the memory back meanwhile.
  private var pendingGuard: UInt64 = 0
  /// Slices whose deadline has passed at this time are not copied.
  private let now: UInt64
  private(set) var tally = SharedMemoryCounters.Tally()

  static let vectorLimit = 128

  /// `vectors` has room for `2 * vectorLimit`.
  @inline(__always)
  init(
    _ copier: consuming SharedMemoryCopier, vectors: UnsafeMutablePointer<iovec>, now: UInt64
  ) {
    self.copier = copier
    self.now = now
    localVectors = vectors
    remoteVectors = vectors + Self.vectorLimit
  }

  /// Copies a slice now or in `flush`.
  mutating func add(_ slice: SlicePointer) {
    let count = slice.pointee.length
    let opcode = slice.pointee.opcode
    if slice.pointee.batch.isCancelRequested { return end(slice, .canceled) }
    if slice.pointee.deadline <= now { return end(slice, .late) }
    if count > SharedMemoryCopier.pieceBytes {
      flush()
      return end(slice, copier.copy(slice))
    }
    switch copier.method(for: opcode, slice.pointee.local, slice.pointee.remote, count) {
    case .none: end(slice, .refused)
    case .mapped: copyAlone(slice)
    case .kernel:
      // Before `flush`, which may look at a newer table than this slice was found in.
      let guardValue = copier.guardValue
      if opcode != pendingOpcode || guardValue != pendingGuard || pending.count == Self.vectorLimit
        || pendingBytes + count > SharedMemoryCopier.pieceBytes
      {
        flush()
      }
      pendingGuard = guardValue
      localVectors[pending.count] = iovec(iov_base: slice.pointee.local, iov_len: count)
      remoteVectors[pending.count] = iovec(
        iov_base: UnsafeMutableRawPointer(bitPattern: UInt(slice.pointee.remote)), iov_len: count)
      pendingOpcode = opcode
      pendingBytes += count
      pending.append(slice)
    }
  }

  /// Copies the pending slices.
  mutating func flush() {
    let count = pending.count
    var index = 0
    var isValid = true
    while index < count {
      if isValid {
        let result = copier.copyByKernel(
          pendingOpcode, localVectors + index, remoteVectors + index, count: count - index,
          expected: pendingGuard)
        var left = max(0, result)
        while index < count, left >= localVectors[index].iov_len {
          left -= localVectors[index].iov_len
          index += 1
          if let slice = pending.popFirst() { end(slice, .done) }
        }
        if index == count { break }
        if result < 0 {
          let mayRetry = copier.mayRetry(after: result)
          if mayRetry && result == Int(LINUX_COPY_INTERRUPTED) { continue }
          // Another table: each of the rest is looked up anew.
          isValid = false
        }
      }
      // The kernel says how far it came, not why: the next slice shows it alone.
      if let slice = pending.popFirst() { copyAlone(slice) }
      index += 1
    }
    pending = SliceQueue()
    pendingBytes = 0
  }

  private mutating func copyAlone(_ slice: SlicePointer) {
    let isDone = copier.copyPiece(
      slice.pointee.opcode, slice.pointee.local, slice.pointee.remote, slice.pointee.length)
    end(slice, isDone ? .done : .refused)
  }

  @inline(__always)
  private mutating func end(_ slice: SlicePointer, _ outcome: SharedMemoryCopier.Outcome) {
    switch outcome {
    case .done:
      tally.count(slice.pointee.opcode, slice.pointee.length)
      Batch.end(slice, .completed)
    case .refused:
      tally.refusals += 1
      refused.append(slice)
    case .canceled: fail(slice, .canceled)
    case .late: fail(slice, .timeout)
    }
  }

  private mutating func fail(_ slice: SlicePointer, _ outcome: MooncakeEngine.Outcome) {
    tally.failures += 1
    let what = "\(slice.pointee.opcode) of \(slice.pointee.length) bytes through shared memory"
    Batch.end(
      slice, outcome,
      reason: outcome == .canceled
        ? "\(what): canceled" : "\(what): deadline passed before all of it was copied")
  }
}
