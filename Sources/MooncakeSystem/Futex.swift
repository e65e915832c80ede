import CLinux
import Glibc
import Synchronization

/// A 32-bit word on which threads sleep until another thread changes and wakes it. The memory is
/// allocated once so that its address is stable.
package struct Futex: ~Copyable, @unchecked Sendable {
  // Unchecked: the word is only ever used through atomics or the kernel.
  private let word: UnsafeMutablePointer<Atomic<UInt32>>

  package init(_ value: UInt32 = 0) {
    word = .allocate(capacity: 1)
    word.initialize(to: Atomic(value))
  }

  deinit {
    word.deinitialize(count: 1)
    word.deallocate()
  }

  @inline(__always)
  package var value: UInt32 { word.pointee.load(ordering: .acquiring) }

  @inline(__always)
  package func store(_ value: UInt32) { word.pointee.store(value, ordering: .releasing) }

  /// Adds one; wraps around.
  package func increment() { word.pointee.wrappingAdd(1, ordering: .acquiringAndReleasing) }

  /// Subtracts one; wraps around.
  package func decrement() { word.pointee.wrappingSubtract(1, ordering: .acquiringAndReleasing) }

  @inline(__always)
  package func exchange(_ value: UInt32) -> UInt32 {
    word.pointee.exchange(value, ordering: .acquiringAndReleasing)
  }

  /// Sleeps while the word equals `expected`, until a wake or the deadline; may return early.
  package func wait(while expected: UInt32, until deadline: Deadline) {
    word.withMemoryRebound(to: UInt32.self, capacity: 1) { raw in
      if var time = deadline.timespecValue {
        _ = linux_futex_wait(raw, expected, &time)
      } else {
        _ = linux_futex_wait(raw, expected, nil)
      }
    }
  }

  package func wakeAll() {
    _ = word.withMemoryRebound(to: UInt32.self, capacity: 1) { linux_futex_wake($0, Int32.max) }
  }
}

/// Tells the processor that the caller is spinning.
@inline(__always)
package func relaxProcessor() { linux_cpu_relax() }
