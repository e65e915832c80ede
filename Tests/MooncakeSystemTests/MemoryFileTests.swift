import CLinux
import Glibc
import MooncakeSystem
import MooncakeTestSupport
import Testing

struct MemoryFileTests {
  @Test func everybodySeesTheSameBytes() throws {
    let file = try MemoryFile(name: "test", byteCount: 5000)
    #expect(file.byteCount == 8192)
    let one = try file.map(writable: true)
    let other = try file.map(writable: false)
    one.address.storeBytes(of: 0x1122, as: UInt16.self)
    #expect(other.address.load(as: UInt16.self) == 0x1122)
  }

  /// Truncating the file would kill every other process that touches the lost pages.
  @Test func nobodyChangesTheSize() throws {
    let file = try MemoryFile(name: "test", byteCount: 8192)
    for size in [0, 4096, 16_384] {
      #expect(ftruncate(file.descriptor.rawValue, size) == -1 && errno == EPERM)
    }
  }

  @Test func noMoreWriters() throws {
    let file = try MemoryFile(name: "test", byteCount: 4096)
    let writer = try file.map(writable: true)
    try file.sealAgainstWriters()
    #expect(throws: Errno(EPERM)) { _ = try file.map(writable: true) }
    writer.address.storeBytes(of: 7, as: UInt8.self)
    let reader = try file.map(writable: false)
    #expect(reader.address.load(as: UInt8.self) == 7)
  }

  @Test func aReaderCannotWrite() throws {
    let file = try MemoryFile(name: "test", byteCount: 4096)
    let reader = try file.readOnlyDescriptor()
    #expect(
      mmap(nil, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, reader.rawValue, 0) == MAP_FAILED)
  }

  @Test func receivesOnlyWhatStays() throws {
    func receive(_ descriptor: Int32, _ byteCount: Int) -> Errno? {
      do throws(Errno) {
        _ = try MemoryFile(receiving: FileDescriptor(owning: dup(descriptor)), byteCount: byteCount)
        return nil
      } catch { return error }
    }
    let sealed = try MemoryFile(name: "test", byteCount: 4096)
    #expect(receive(sealed.descriptor.rawValue, 4096) == nil)
    #expect(receive(sealed.descriptor.rawValue, 4097) == Errno(EPERM))
    #expect(receive(sealed.descriptor.rawValue, 0) == Errno(EPERM))
    let unsealed = FileDescriptor(
      owning: memfd_create("test", UInt32(MFD_CLOEXEC) | UInt32(MFD_ALLOW_SEALING)))
    #expect(ftruncate(unsealed.rawValue, 4096) == 0)
    #expect(receive(unsealed.rawValue, 4096) == Errno(EPERM))
    let device = try FileDescriptor.open("/dev/zero", flags: O_RDWR)
    #expect(receive(device.rawValue, 4096) != nil)
  }
}

struct LocalSocketTests {
  @Test func messagesAndDescriptors() throws {
    let name = "mooncake-test-\(getpid())-\(UInt64.random(in: 0 ... .max))"
    let listener = try LocalSocket.listening(on: name)
    #expect(throws: Errno(EADDRINUSE)) { _ = try LocalSocket.listening(on: name) }
    let client = try LocalSocket.connected(to: name)
    guard let server = try listener.accept() else { return #expect(Bool(false), "no connection") }
    let credentials = try client.credentials()
    #expect(credentials.process == getpid() && credentials.user == geteuid())

    let file = try MemoryFile(name: "test", byteCount: 4096)
    try withUnsafeBytes(of: UInt64(42)) { bytes throws(Errno) in
      try server.send(bytes, descriptors: [file.descriptor.rawValue, 0])
      try server.send(bytes)
    }
    var word: UInt64 = 0
    let (count, descriptors) = try withUnsafeMutableBytes(of: &word) { bytes throws(Errno) in
      try client.receive(bytes)
    }
    #expect(count == 8 && word == 42 && descriptors.count == 2)
    for descriptor in descriptors {
      #expect(fcntl(descriptor, F_GETFD) & FD_CLOEXEC != 0)
      close(descriptor)
    }
    let second = try withUnsafeMutableBytes(of: &word) { bytes throws(Errno) in
      try client.receive(bytes)
    }
    #expect(second.byteCount == 8 && second.descriptors.isEmpty)
    #expect(throws: Errno(EAGAIN)) {
      _ = try withUnsafeMutableBytes(of: &word) { bytes throws(Errno) in try client.receive(bytes) }
    }
  }

  @Test func nobodyListens() {
    #expect(throws: Errno(ECONNREFUSED)) { _ = try LocalSocket.connected(to: "mooncake-nobody") }
    #expect(throws: Errno(EINVAL)) { _ = try LocalSocket.connected(to: "") }
  }
}
