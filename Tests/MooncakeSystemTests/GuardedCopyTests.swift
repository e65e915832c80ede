import CLinux
import Glibc
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Copies that a guard word and signals interrupt.
struct GuardedCopyTests {
  /// Keeps sending a signal to the calling thread while `body` runs.
  private static func underSignals(_ body: () throws -> Void) throws {
    signal(SIGURG) { _ in }
    let target = Box(pthread_self())
    let isOver = Atomic<Bool>(false)
    let sender = try WorkerThread.start(name: "signals") {
      while !isOver.load(ordering: .relaxed) {
        pthread_kill(target.value, SIGURG)
        sleepBriefly(nanoseconds: 20_000)
      }
    }
    defer {
      isOver.store(true, ordering: .relaxed)
      sender.join()
    }
    try body()
  }

  private final class Box<Value>: @unchecked Sendable {
    // Unchecked: never changed.
    let value: Value
    init(_ value: Value) { self.value = value }
  }

  @Test(arguments: [0, Int(linux_vector_bytes())])
  func everyByteDespiteSignals(_ vectorBytes: Int) throws {
    let size = 1 << 20
    let source = try MemoryMapping.anonymous(byteCount: size)
    let target = try MemoryMapping.anonymous(byteCount: size)
    let (from, to) = (source.address, target.address)
    for offset in stride(from: 0, to: size, by: 8) {
      (from + offset).storeBytes(of: UInt64.random(in: 0 ... .max), as: UInt64.self)
    }
    let rseq = linux_rseq_area()
    var word: UInt64 = 1
    var interruptions = 0
    func copies(_ count: Int) -> Bool {
      let (here, there) = (Int.random(in: 0..<100), Int.random(in: 1..<100))
      memset(to, 0x77, there + count + 1)
      var left = count
      while true {
        let result = linux_guarded_copy(
          to + there + count, from + here + count, &left, Int32(vectorBytes), &word, 1, rseq)
        if result == 0 { break }
        if result != Int(LINUX_COPY_INTERRUPTED) { return false }
        interruptions += 1
      }
      return left == 0 && memcmp(to + there, from + here, count) == 0
        && to.load(fromByteOffset: there - 1, as: UInt8.self) == 0x77
        && to.load(fromByteOffset: there + count, as: UInt8.self) == 0x77
    }
    try Self.underSignals {
      for count in 1...1500 { try #require(copies(count), "\(count) bytes") }
      // On a busy machine it may take long until a signal hits a copy.
      let deadline = Deadline.after(milliseconds: 60_000)
      var rounds = 0
      while rounds < 1500 || rseq != nil && interruptions < 10 && !deadline.hasPassed {
        let count = Int.random(in: 1...1_000_000)
        try #require(copies(count), "\(count) bytes")
        rounds += 1
      }
    }
    #expect(rseq == nil || interruptions > 0, "no copy was interrupted: the test shows nothing")
  }

  @Test func aChangedGuardStopsIt() {
    var word: UInt64 = 2
    var (source, target): (UInt64, UInt64) = (5, 6)
    var left = 8
    let result = withUnsafeMutableBytes(of: &target) { target in
      withUnsafeBytes(of: &source) { source in
        linux_guarded_copy(
          target.baseAddress! + 8, source.baseAddress! + 8, &left, 0, &word, 1, linux_rseq_area())
      }
    }
    #expect(result == Int(LINUX_COPY_CHANGED) && left == 8 && target == 6)
  }

  @Test(arguments: [false, true])
  func throughTheKernel(_ isPlain: Bool) {
    let rseq = isPlain ? nil : linux_rseq_area()
    var word: UInt64 = 1
    var (source, target): (UInt64, UInt64) = (5, 6)
    func copy(_ process: pid_t, _ address: UnsafeMutableRawPointer?, _ expected: UInt64) -> Int {
      withUnsafeMutableBytes(of: &target) { bytes in
        var local = iovec(iov_base: bytes.baseAddress, iov_len: 8)
        var remote = iovec(iov_base: address, iov_len: 8)
        return linux_guarded_kernel_copy(0, process, &local, &remote, 1, &word, expected, rseq)
      }
    }
    withUnsafeMutableBytes(of: &source) { bytes in
      let address = bytes.baseAddress!
      #expect(copy(getpid(), address, 2) == Int(LINUX_COPY_CHANGED))
      #expect(target == 6)
      #expect(copy(getpid(), address, 1) == 8)
      #expect(target == 5)
      #expect(copy(getpid(), UnsafeMutableRawPointer(bitPattern: 8), 1) == -Int(EFAULT))
      #expect(copy(.max, address, 1) == -Int(ESRCH))
    }
  }
}
