import CLinux
import Synchronization

/// A mutex that holds what it protects.
///
/// Not the standard library's: that one stores the owner's thread number, which a thread looks up
/// once. In a forked child the cached number is the parent's, and the first contended unlock ends
/// the process. This lock stores no owner, so locks made in the child work.
///
/// Public, frozen and transparent like the standard library's: otherwise callers go through
/// unspecialized generic code, about a hundred instructions per call.
@frozen
public struct Lock<Value: ~Copyable>: ~Copyable, @unchecked Sendable {
  // Unchecked: only the thread that holds the word touches the value. The value is not first,
  // because the thread sanitizer would take a change of it for one of the lock at the same address.
  @usableFromInline let value: _Cell<Value>
  @usableFromInline let word: Atomic<UInt32>

  @_transparent
  public init(_ value: consuming sending Value) {
    word = Atomic(0)
    self.value = _Cell(value)
  }

  /// Runs `body` while no other thread is inside.
  @_transparent
  public func withLock<Result: ~Copyable, Failure: Error>(
    _ body: (inout sending Value) throws(Failure) -> sending Result
  ) throws(Failure) -> sending Result {
    if !LockWord.tryTake(word) { LockWord.take(word) }
    defer { LockWord.release(word) }
    // Through a separate pointer: otherwise the thread sanitizer takes a change of the value for
    // one of the whole lock.
    let address = value._address
    return try body(&address.pointee)
  }
}

/// The word of a lock.
@usableFromInline
enum LockWord {
  @inlinable static var free: UInt32 { 0 }
  @inlinable static var held: UInt32 { 1 }
  /// Held, and a thread may be asleep waiting for it.
  @inlinable static var awaited: UInt32 { 2 }

  /// Most holders let go within this many spins.
  private static let spinCount = 100

  @inlinable
  @inline(__always)
  static func tryTake(_ word: borrowing Atomic<UInt32>) -> Bool {
    word.compareExchange(
      expected: free, desired: held, successOrdering: .acquiring, failureOrdering: .relaxed
    ).exchanged
  }

  /// Takes a lock that is held.
  @usableFromInline
  @inline(never)
  static func take(_ word: borrowing Atomic<UInt32>) {
    for _ in 0..<spinCount {
      if word.load(ordering: .relaxed) == free && tryTake(word) { return }
      relaxProcessor()
    }
    // A thread that has slept takes the lock as awaited, since others may still be asleep.
    while word.exchange(awaited, ordering: .acquiring) != free {
      sleep(word, while: awaited, until: .never)
    }
  }

  @inlinable
  @inline(__always)
  static func release(_ word: borrowing Atomic<UInt32>) {
    if word.exchange(free, ordering: .releasing) == awaited { wake(word, count: 1) }
  }

  /// Sleeps while the word equals `value`, until a wake or the deadline; may return early.
  static func sleep(
    _ word: borrowing Atomic<UInt32>, while value: UInt32, until deadline: Deadline
  ) {
    withAddress(of: word) { address in
      if var time = deadline.timespecValue {
        _ = linux_futex_wait(address, value, &time)
      } else {
        _ = linux_futex_wait(address, value, nil)
      }
    }
  }

  @usableFromInline
  @inline(never)
  static func wake(_ word: borrowing Atomic<UInt32>, count: Int32) {
    withAddress(of: word) { _ = linux_futex_wake($0, count) }
  }

  /// Safe because an atomic does not move while it is borrowed.
  private static func withAddress(
    of word: borrowing Atomic<UInt32>, _ body: (UnsafeMutablePointer<UInt32>) -> Void
  ) {
    withUnsafePointer(to: word) { pointer in
      let raw = UnsafeMutableRawPointer(mutating: UnsafeRawPointer(pointer))
      body(raw.assumingMemoryBound(to: UInt32.self))
    }
  }
}
