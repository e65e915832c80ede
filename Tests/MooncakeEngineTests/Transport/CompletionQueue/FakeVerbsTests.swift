import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// The stand-in for hardware refuses what hardware refuses.
struct FakeVerbsTests {
  private struct Ends {
    let verbs: FakeVerbs
    let pair: FakeQueuePair
    let local = GuardedMemory(8192)
    let memory = GuardedMemory(8192)
    let localKey: UInt32
    let remoteKey: UInt32

    init() throws {
      verbs = try FakeVerbs(deviceCount: 2)
      pair = try #require(verbs.devices[0].connect(to: verbs.table, device: 1))
      func number(_ memory: GuardedMemory) -> UInt64 { UInt64(UInt(bitPattern: memory.address)) }
      localKey = verbs.registerRegion(number(local), 8192, .local, on: 0).localKey
      remoteKey = verbs.registerRegion(number(memory), 8192, .remoteWrite, on: 1).remoteKey
      local.fill(0x11)
    }

    func post(
      _ id: UInt64, _ opcode: Opcode = .write, key: UInt32? = nil, localKey: UInt32? = nil,
      offset: UInt64 = 0, length: Int = 4096
    ) {
      verbs.devices[0].post(
        WorkRequest(
          id: id, pair: pair, opcode: opcode, local: local.address,
          localKey: localKey ?? self.localKey,
          remote: UInt64(UInt(bitPattern: memory.address)) + offset, remoteKey: key ?? remoteKey,
          length: length))
    }

    func completions(_ count: Int) -> [WorkCompletion.Status] {
      var all: [WorkCompletion] = []
      _ = eventually {
        all += verbs.completions.takeAll()
        return all.count >= count
      }
      return all.sorted { $0.id < $1.id }.map(\.status)
    }

    func stop() {
      verbs.stop()
      #expect(verbs.table.close(until: .after(milliseconds: 1000)))
    }
  }

  @Test func aGoodKey() throws {
    let ends = try Ends()
    defer { ends.stop() }
    ends.post(1, offset: 4096)
    #expect(ends.completions(1) == [.success] && ends.pair.isReady)
    #expect(ends.memory.bytes[4095] == 0 && ends.memory.bytes[4096] == 0x11)
  }

  /// The first bad request puts the queue pair into the error state, which flushes those behind it.
  @Test(arguments: 0..<6)
  func aBadRequest(_ which: Int) throws {
    let ends = try Ends()
    defer { ends.stop() }
    ends.verbs.devices[0].pause(true)
    switch which {
    case 0: ends.post(1, key: ends.remoteKey + (1 << 15))
    case 1: ends.post(1, .read)
    case 2: ends.post(1, offset: 4097)
    case 3: ends.post(1, key: ends.localKey)
    case 4: ends.post(1, localKey: ends.localKey + (1 << 15))
    default:
      ends.verbs.table.invalidate(ends.remoteKey)
      ends.post(1)
    }
    ends.post(2)
    ends.verbs.devices[0].pause(false)
    let first: WorkCompletion.Status = which == 4 ? .localProtection : .remoteAccess
    #expect(ends.completions(2) == [first, .flushed] && !ends.pair.isReady)
    #expect(ends.memory.holdsOnly(0) && ends.local.holdsOnly(0x11))
  }

  /// A key is not used again for another region.
  @Test func keysDiffer() throws {
    let ends = try Ends()
    defer { ends.stop() }
    ends.verbs.table.invalidate(ends.remoteKey)
    #expect(ends.verbs.table.release(ends.remoteKey))
    let next = ends.verbs.registerRegion(
      UInt64(UInt(bitPattern: ends.memory.address)), 8192, .remoteWrite, on: 1
    ).remoteKey
    #expect(next != ends.remoteKey && next % (1 << 15) == ends.remoteKey % (1 << 15))
    ends.post(1)
    #expect(ends.completions(1) == [.remoteAccess])
  }
}
