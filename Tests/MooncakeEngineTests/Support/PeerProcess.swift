import CLinux
import Glibc
import MooncakeSystem

/// A peer in its own process, which a test can stop and kill.
final class PeerProcess: @unchecked Sendable {
  // Unchecked: used by one test at a time.
  struct StartError: Error { var reason: String }

  /// The name of the peer's segment.
  private(set) var name = ""
  /// The address of the peer's buffer in its own process.
  private(set) var address: UInt64 = 0
  private(set) var length = 0
  private let pid: pid_t
  private let input: FileDescriptor
  private let output: FileDescriptor
  private var hasEnded = false

  /// The initial contents of the peer's buffer.
  static let fillByte: UInt8 = 0x5A

  /// Starts a peer that serves a buffer; port 0 lets the system choose.
  static func serving(byteCount: Int, port: UInt16 = 0) throws -> PeerProcess {
    try serving(["serve", String(byteCount), String(port)])
  }

  /// Starts a peer with these arguments, which serves memory.
  static func serving(_ arguments: [String]) throws -> PeerProcess {
    let peer = try PeerProcess(arguments)
    let fields = try peer.readLine().split(separator: " ")
    guard fields.count == 3, let address = UInt64(fields[1]), let length = Int(fields[2]) else {
      throw StartError(reason: "the peer said \(fields)")
    }
    peer.name = String(fields[0])
    peer.address = address
    peer.length = length
    return peer
  }

  init(_ arguments: [String]) throws {
    let stdin = try Self.makePipe()
    let stdout = try Self.makePipe()
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, stdin.read, 0)
    posix_spawn_file_actions_adddup2(&actions, stdout.write, 1)
    let path = try Self.executable()
    var argv = ([path] + arguments).map { strdup($0) } + [nil]
    defer { for argument in argv { free(argument) } }
    var pid = pid_t()
    let result = posix_spawn(&pid, path, &actions, nil, &argv, Glibc.environ)
    close(stdin.read)
    close(stdout.write)
    input = FileDescriptor(owning: stdin.write)
    output = FileDescriptor(owning: stdout.read)
    if result != 0 { throw StartError(reason: "\(path): \(Errno(result))") }
    self.pid = pid
  }

  deinit { kill() }

  /// Sends the process a line. An empty one ends a copying peer.
  func tell(_ line: String = "") {
    var line = line + "\n"
    line.withUTF8 { _ = write(input.rawValue, $0.baseAddress, $0.count) }
  }

  /// Returns when every thread of the process has stopped.
  func stop() {
    Glibc.kill(pid, SIGSTOP)
    var status: Int32 = 0
    while waitpid(pid, &status, WUNTRACED) == -1 && errno == EINTR {}
  }

  func resume() { Glibc.kill(pid, SIGCONT) }

  /// Memory used by the process, in bytes.
  func residentBytes() -> Int {
    let file = open("/proc/\(pid)/statm", O_RDONLY | O_CLOEXEC)
    if file < 0 { return -1 }
    defer { close(file) }
    var bytes = [UInt8](repeating: 0, count: 256)
    let count = read(file, &bytes, bytes.count)
    let fields = String(decoding: bytes.prefix(max(0, count)), as: UTF8.self).split(separator: " ")
    return fields.count > 1 ? (Int(fields[1]) ?? -1) * MemoryMapping.pageBytes : -1
  }

  /// Kills the process.
  func kill() {
    if hasEnded { return }
    Glibc.kill(pid, SIGKILL)
    reap()
  }

  /// Waits until the process exits; returns its exit status, 128 + number for a signal.
  func waitForExit(within milliseconds: UInt64) -> Int32? {
    let deadline = Deadline.after(milliseconds: milliseconds)
    while !deadline.hasPassed {
      var status: Int32 = 0
      if waitpid(pid, &status, WNOHANG) == pid {
        hasEnded = true
        return status & 0x7F == 0 ? status >> 8 & 0xFF : 128 + status & 0x7F
      }
      usleep(2000)
    }
    return nil
  }

  /// A line of the process's output.
  func readLine(within milliseconds: UInt64 = 10_000) throws -> String {
    let deadline = Deadline.after(milliseconds: milliseconds)
    var bytes: [UInt8] = []
    while true {
      var item = pollfd(fd: output.rawValue, events: Int16(POLLIN), revents: 0)
      guard poll(&item, 1, deadline.remainingMilliseconds) > 0 else {
        throw StartError(reason: "the peer is silent")
      }
      var byte: UInt8 = 0
      guard read(output.rawValue, &byte, 1) == 1 else {
        throw StartError(reason: "the peer ended after \(String(decoding: bytes, as: UTF8.self))")
      }
      if byte == UInt8(ascii: "\n") { return String(decoding: bytes, as: UTF8.self) }
      bytes.append(byte)
    }
  }

  private func reap() {
    var status: Int32 = 0
    while waitpid(pid, &status, 0) == -1 && errno == EINTR {}
    hasEnded = true
  }

  private static func makePipe() throws -> (read: Int32, write: Int32) {
    var ends: [Int32] = [0, 0]
    _ = try retryingInterrupts { pipe2(&ends, O_CLOEXEC) }
    return (ends[0], ends[1])
  }

  /// The package builds the peer into the folder of the test bundle.
  private static func executable() throws -> String {
    var info = Dl_info()
    let marker = unsafeBitCast(locate as @convention(c) () -> Void, to: UnsafeRawPointer.self)
    guard dladdr(marker, &info) != 0, let file = info.dli_fname else {
      throw StartError(reason: "the test bundle has no path")
    }
    let bundle = String(cString: file)
    guard let slash = bundle.lastIndex(of: "/") else {
      throw StartError(reason: "the test bundle is \(bundle)")
    }
    return bundle[...slash] + "MooncakeTestPeer"
  }
}

private let locate: @convention(c) () -> Void = {}
