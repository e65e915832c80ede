// Peers for the tests of shared memory. Words of FLAGS, joined by commas or "-":
//   nobody      gives up root first, so that file permissions and ptrace rules apply
//   closed      lets no process of its user trace it
//   ordinary    uses memory that the engine does not own
//   readable    share: grants no writing
//   few         copy: has no free descriptor until the peer is lost; prints "lost", and "again"
//               when it is reached through memory anew
//
//   share LENGTH FLAGS                            serves memory full of 0x5A: prints
//                                                 "NAME ADDRESS LENGTH", ends when stdin closes. A
//                                                 line N leaves it N free descriptors: "limited"
//   copy NAME ADDRESS LENGTH read|write COUNT FLAGS
//     Prints "ready", then copies COUNT times (0: until stdin closes) whether or not it succeeds.
//     Writes 0x77; prints "late" if a read that completed brought a byte 0xEE. At the end prints
//     "done", completed copies, bytes moved through shared memory.

import CLinux
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// The flags for the process and its memory.
private struct Setting {
  let isOrdinary: Bool
  let hasFew: Bool
  private let access: Access

  init(_ flags: String) {
    let words = flags.split(separator: ",")
    isOrdinary = words.contains("ordinary")
    hasFew = words.contains("few")
    access = words.contains("readable") ? .remoteRead : [.remoteRead, .remoteWrite]
    if words.contains("nobody") && geteuid() == 0 {
      if setgid(65_534) != 0 || setuid(65_534) != 0 { fail("cannot give up root: \(errno)") }
      // Changing users makes a process untraceable until it asks otherwise.
      _ = linux_set_dumpable(1)
    }
    if words.contains("closed") { _ = linux_set_dumpable(0) }
  }

  func memory(_ engine: TransferEngine, _ count: Int) throws -> UnsafeMutableRawPointer {
    if !isOrdinary { return try engine.allocate(length: UInt64(count), access: access) }
    let memory = try MemoryMapping.anonymous(byteCount: count).release().baseAddress!
    try engine.register(memory, length: UInt64(count), access: access)
    return memory
  }
}

/// Serves memory.
struct SharingPeer {
  private let count: Int
  private let setting: Setting

  init(_ arguments: [String]) {
    guard arguments.count == 2, let count = Int(arguments[0]) else { fail("share LENGTH FLAGS") }
    self.count = count
    setting = Setting(arguments[1])
  }

  func run() throws {
    let engine = try TransferEngine()
    let memory = try setting.memory(engine, count)
    memset(memory, 0x5A, count)
    say("\(engine.name) \(UInt(bitPattern: memory)) \(count)")
    while let line = readLine() {
      if let count = UInt(line) {
        limitDescriptors(to: count)
        say("limited")
      }
    }
    engine.close()
  }
}

/// Leaves the process that many descriptor numbers, counted from the lowest free one.
private func limitDescriptors(to count: UInt) {
  let free = dup(STDIN_FILENO)
  close(free)
  var limit = rlimit(rlim_cur: UInt(max(free, 0)) + count, rlim_max: 0)
  var current = rlimit()
  getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &current)
  limit.rlim_max = current.rlim_max
  if free < 0 { limit.rlim_cur = current.rlim_cur + count }
  setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
}

/// Copies over and over.
struct CopyingPeer {
  private let name: String
  private let address: UInt64
  private let count: Int
  private let opcode: Opcode
  private let rounds: Int
  private let setting: Setting

  init(_ arguments: [String]) {
    guard arguments.count == 6, let address = UInt64(arguments[1]), let count = Int(arguments[2]),
      let rounds = Int(arguments[4])
    else { fail("copy NAME ADDRESS LENGTH read|write COUNT FLAGS") }
    name = arguments[0]
    self.address = address
    self.count = count
    opcode = arguments[3] == "write" ? .write : .read
    self.rounds = rounds
    setting = Setting(arguments[5])
  }

  func run() throws {
    let engine = try TransferEngine()
    let local = try setting.memory(engine, count)
    memset(local, 0x77, count)
    let segment = try engine.openSegment(name)
    say("ready")
    var former = rlimit()
    getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &former)
    if setting.hasFew { limitDescriptors(to: 0) }
    var isLost = false
    var completed = 0
    var round = 0
    while rounds == 0 ? !hasInputEnded : round < rounds {
      round += 1
      if setting.hasFew {
        let isUsable = try engine.sharedMemoryPeer(of: segment)?.isUsable ?? false
        if isUsable == isLost {
          say(isLost ? "again" : "lost")
          isLost.toggle()
          setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &former)
        }
      }
      if opcode == .read { memset(local, 0, count) }
      let request = TransferRequest(
        opcode: opcode, segment: segment, source: local, targetOffset: address,
        length: UInt64(count))
      do throws(MooncakeError) {
        try withUnsafePointer(to: request) { pointer throws(MooncakeError) in
          try engine.transfer(
            UnsafeBufferPointer(start: pointer, count: 1), timeoutMilliseconds: 5000)
        }
        completed += 1
        if opcode == .read && memchr(local, 0xEE, count) != nil { say("late") }
      } catch {
        usleep(500)
      }
    }
    let totals = engine.sharedMemory?.counters
    let moved =
      (totals?.readBytes.load(ordering: .relaxed) ?? 0)
      + (totals?.writtenBytes.load(ordering: .relaxed) ?? 0)
    say("done \(completed) \(moved)")
    engine.close()
  }

  private var hasInputEnded: Bool {
    var item = pollfd(fd: STDIN_FILENO, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, 0) > 0
  }
}
