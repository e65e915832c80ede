import CLinux
import Glibc
import MooncakeSystem
import Testing

private func isOpen(_ descriptor: Int32) -> Bool { fcntl(descriptor, F_GETFD) >= 0 }

private func isReadable(_ descriptor: Int32) -> Bool {
  var item = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
  return poll(&item, 1, 0) == 1
}

struct FileDescriptorTests {
  @Test func openIsCloseOnExec() throws {
    let file = try FileDescriptor.open("/dev/null", flags: O_RDWR)
    #expect(fcntl(file.rawValue, F_GETFD) & FD_CLOEXEC != 0)
  }

  @Test func missingFile() {
    #expect(throws: Errno(ENOENT)) {
      _ = try FileDescriptor.open("/nonexistent/file", flags: O_RDONLY)
    }
  }

  @Test func releaseKeepsItOpen() throws {
    let raw = try FileDescriptor.open("/dev/null", flags: O_RDONLY).release()
    #expect(isOpen(raw))
    close(raw)
  }

  @Test func errnoText() {
    #expect(Errno(ECONNREFUSED).description == "Connection refused")
    #expect(!Errno(99_999).description.isEmpty)
  }
}

struct EventFDTests {
  @Test func signalAndClear() throws {
    let event = try EventFD()
    let descriptor = event.descriptor.rawValue
    #expect(!isReadable(descriptor))
    event.clear()
    event.signal()
    event.signal()
    #expect(isReadable(descriptor))
    event.clear()
    #expect(!isReadable(descriptor))
    event.signal()
    #expect(isReadable(descriptor))
  }

  @Test func keepOpen() throws {
    let raw = try EventFD().keepOpen()
    #expect(isOpen(raw))
    close(raw)
  }
}

struct EpollTests {
  @Test func reportsTokensOfReadyDescriptors() throws {
    let epoll = try Epoll()
    let first = try EventFD()
    let second = try EventFD()
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: 4)
    defer { events.deallocate() }
    try epoll.add(first.descriptor.rawValue, events: Epoll.readable, token: 1 << 40)
    try epoll.add(second.descriptor.rawValue, events: Epoll.readable, token: .max)
    #expect(throws: Errno(EEXIST)) {
      try epoll.add(first.descriptor.rawValue, events: Epoll.readable, token: 3)
    }
    #expect(epoll.wait(into: events, timeoutMilliseconds: 0) == 0)
    first.signal()
    #expect(epoll.wait(into: events, timeoutMilliseconds: 1000) == 1)
    #expect(events[0].data.u64 == 1 << 40)
    // Level-triggered: still reported.
    second.signal()
    #expect(epoll.wait(into: events, timeoutMilliseconds: 1000) == 2)
    #expect(Set(events.prefix(2).map(\.data.u64)) == [1 << 40, .max])

    try epoll.modify(first.descriptor.rawValue, events: 0, token: 1)
    epoll.remove(second.descriptor.rawValue)
    epoll.remove(second.descriptor.rawValue)
    #expect(epoll.wait(into: events, timeoutMilliseconds: 0) == 0)
    #expect(throws: Errno(ENOENT)) {
      try epoll.modify(second.descriptor.rawValue, events: Epoll.readable, token: 1)
    }
    #expect(throws: Errno(EBADF)) { try epoll.add(-1, events: Epoll.readable, token: 1) }
  }
}
