import Glibc
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Synchronization
import Testing

/// Runs in which some slices wait for a common system call.
struct SharedMemoryRunTests {
  /// A slice waits for a kernel copy while its neighbor in mapped memory is copied. Its memory is
  /// unregistered in between and must not be touched any more.
  @Test(arguments: [Opcode.read, .write])
  func takenBackWhileANeighborIsCopied(_ opcode: Opcode) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let shared = try #require(pair.initiator.sharedMemory)
    let path = try pair.initiator.sharedMemoryPath(of: pair.segment)
    let peer = try #require(path.peer)
    let ordinary = try RegisteredMemory(.ordinary, pair.target, 4096)
    let mapped = try RegisteredMemory(.mapped, pair.target, 1 << 20)
    let local = try RegisteredMemory(.ordinary, pair.initiator, 2 << 20, access: .local)
    local.fill(0x77)
    let batch = Batch(
      capacity: 2, pool: SlicePool(), drivers: DriverTable(), announcer: pair.initiator)
    _ = try batch.beginSubmit(2)
    for (index, (memory, place)) in [(ordinary, 0), (mapped, 1 << 20)].enumerated() {
      batch.prepare(
        index, segment: pair.segment,
        Slice(
          task: batch.tasks + index, local: local.address + place,
          remote: UInt64(UInt(bitPattern: memory.address)), length: memory.count, deadline: .max,
          opcode: opcode, isPooled: false))
    }
    batch.publish(2, notification: nil)
    batch.endSubmit()

    let complaints = Complaints()
    let isTakenBack = Atomic<Bool>(false)
    var remover: WorkerThread?
    var step = 0
    var refused = shared.copy(path, peer, totalBytes: 1 << 20, now: Clock.now()) {
      step += 1
      switch step {
      case 1: return batch.slices
      case 2:
        remover = try? WorkerThread.start(name: "remover") {
          complaints.check("unregister") { try pair.target.unregister(ordinary.address) }
          isTakenBack.store(true, ordering: .sequentiallyConsistent)
        }
        // By then it has changed the guard and is waiting for this thread.
        usleep(50_000)
        return batch.slices + 1
      default:
        let isInTime = eventually { isTakenBack.load(ordering: .sequentiallyConsistent) }
        #expect(isInTime)
        ordinary.fill(0xEE)
        return nil
      }
    }
    remover?.join()
    #expect(complaints.all.isEmpty, "\(complaints.all)")
    #expect(ordinary.holdsOnly(0xEE) && local.bytes[0] == 0x77)
    #expect(refused.count == 1)
    while let slice = refused.popFirst() { Batch.end(slice, .failed(.notRegistered)) }
    #expect(batch.status.completedCount == 1)
    batch.waitUntilQuiet()
  }

  /// Batches of mapped and ordinary slices, small enough to share system calls, while ordinary
  /// memory is constantly unregistered.
  @Test(arguments: [Opcode.read, .write])
  func mixedRunsWhileMemoryIsTakenBack(_ opcode: Opcode) throws {
    let pair = try EnginePair(.sharedMemory)
    defer { pair.close() }
    let blockBytes = 16 << 10
    let blockCount = 16
    let size = blockBytes * blockCount
    let ordinary = try RegisteredMemory(.ordinary, pair.target, size)
    let mapped = try RegisteredMemory(.mapped, pair.target, size)
    let isOver = Atomic<Bool>(false)
    let rounds = Atomic<Int>(0)
    let complaints = Complaints()
    let copier = try WorkerThread.start(name: "copier") {
      let local = try! RegisteredMemory(.ordinary, pair.initiator, 2 * size, access: .local)
      var requests: [TransferRequest] = []
      for index in 0..<(2 * blockCount) {
        let memory = index % 2 == 0 ? ordinary : mapped
        let (here, there) = (local.address + index * blockBytes, index / 2 * blockBytes)
        requests.append(
          opcode == .read
            ? pair.read(into: here, from: memory.address + there, blockBytes)
            : pair.write(from: here, to: memory.address + there, blockBytes))
      }
      while !isOver.load(ordering: .relaxed) {
        local.fill(0x02)
        complaints.check("batch") {
          let batch = try pair.initiator.start(requests)
          let status = try pair.initiator.wait(batch, timeoutMilliseconds: 10_000)
          complaints.require(
            status.state == .completed || status.error == .notRegistered, "\(status)")
          try pair.initiator.freeBatch(batch)
        }
        complaints.require(
          memchr(local.address, 0xEE, local.count) == nil, "bytes of revoked memory arrived")
        rounds.add(1, ordering: .relaxed)
      }
    }
    for round in 0..<100 {
      let before = rounds.load(ordering: .relaxed)
      let goesOn = eventually { rounds.load(ordering: .relaxed) > before }
      #expect(goesOn)
      usleep(UInt32.random(in: 0..<200))
      try pair.target.unregister(ordinary.address)
      ordinary.fill(0xEE)
      usleep(200)
      #expect(ordinary.holdsOnly(0xEE), "round \(round)")
      ordinary.fill(0x01)
      try pair.target.register(
        ordinary.address, length: UInt64(size), access: [.remoteRead, .remoteWrite])
    }
    isOver.store(true, ordering: .relaxed)
    copier.join()
    #expect(complaints.all.isEmpty, "\(complaints.all)")
    #expect(pair.initiator.sharedBytes > 0)
  }
}
