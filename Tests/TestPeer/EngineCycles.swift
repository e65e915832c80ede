import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem

/// Creates, connects, uses and destroys pairs of engines, and counts the process's resources.
struct EngineCycles {
  var count: Int

  struct Leak: Error { var what: String }

  func run() throws {
    // The first cycles load libraries and start what stays for the life of the process.
    for _ in 0..<5 { try cycle() }
    let before = Footprint.now()
    for _ in 0..<count { try cycle() }
    let after = Footprint.now()
    try check("descriptors", before.descriptors, after.descriptors)
    try check("threads", before.threads, after.threads)
    // Allocators keep some memory, sanitizers much; a leak of even 64 KiB a cycle exceeds this.
    if dlsym(nil, "__asan_init") == nil && dlsym(nil, "__tsan_init") == nil {
      try check(
        "resident KiB", before.residentKiB, after.residentKiB, slack: max(8192, count * 32))
    }
    say("ok")
  }

  private func cycle() throws {
    let target = try TransferEngine()
    defer { target.close() }
    let initiator = try TransferEngine()
    defer { initiator.close() }
    let memory = try target.allocate(length: 64 << 10, access: [.remoteRead, .remoteWrite])
    let local = try initiator.allocate(length: 64 << 10, access: .local)
    let segment = try initiator.openSegment(target.name)
    var requests: [TransferRequest] = []
    for opcode in [Opcode.write, .read] {
      requests.append(
        TransferRequest(
          opcode: opcode, segment: segment, source: local,
          targetOffset: UInt64(UInt(bitPattern: memory)), length: 64 << 10))
    }
    let batch = try initiator.createBatch(capacity: 2)
    _ = try initiator.eventDescriptor(of: batch)
    _ = try initiator.eventDescriptor()
    try requests.withUnsafeBufferPointer { requests throws(MooncakeError) in
      try initiator.submit(
        batch, requests, notification: Notification(name: "cycle", message: "done"))
    }
    let status = try initiator.wait(batch, timeoutMilliseconds: 10_000)
    if status.state != .completed { throw Leak(what: "a transfer ended \(status.state)") }
    if target.receiveNotification() == nil { throw Leak(what: "a notification is missing") }
    // Every other cycle leaves freeing to the engine.
    if UInt(bitPattern: local) >> 12 & 1 == 0 {
      try initiator.freeBatch(batch)
      try initiator.closeSegment(segment)
    }
  }

  private func check(_ what: String, _ before: Int, _ after: Int, slack: Int = 0) throws {
    if after > before + slack { throw Leak(what: "\(what): \(before) before, \(after) after") }
  }
}
