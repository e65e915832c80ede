import Glibc
import MooncakeSystem
import Testing

@Suite struct MemoryRoomTests {
  /// Files below a directory that stands in for "/".
  private static func room(_ files: [(String, String)]) -> MemoryRoom? {
    var template = Array("/tmp/mooncake-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { fatalError("no directory for a test") }
    let root = template.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    var made: [String] = []
    defer {
      for path in made.reversed() where unlink(path) != 0 { rmdir(path) }
      rmdir(root)
    }
    for (name, text) in files {
      var path = root
      for part in name.split(separator: "/").dropLast() {
        path += "/" + part
        if mkdir(path, 0o755) == 0 { made.append(path) }
      }
      let file = open(root + "/" + name, O_WRONLY | O_CREAT, 0o644)
      _ = write(file, text, text.utf8.count)
      close(file)
      made.append(root + "/" + name)
    }
    return MemoryRoom.now(root: root)
  }

  private static let machine = (
    "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    1000 kB\nSwapFree:   24 kB\n"
  )

  @Test func theMachineAlone() throws {
    #expect(Self.room([]) == nil)
    let room = try #require(Self.room([Self.machine]))
    #expect(room.byteCount == 1024 << 10 && room.limit.contains("machine"))
    #expect(try #require(MemoryRoom.now()).byteCount > 0)
  }

  @Test func theTightestGroupCounts() throws {
    let room = try #require(
      Self.room([
        Self.machine, ("proc/self/cgroup", "0::/outer/inner\n"),
        ("sys/fs/cgroup/outer/memory.max", "5000\n"),
        ("sys/fs/cgroup/outer/memory.current", "4000\n"),
        ("sys/fs/cgroup/outer/memory.stat", "anon 1000\ninactive_file 1500\nactive_file 1000\n"),
        ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
        ("sys/fs/cgroup/outer/inner/memory.current", "4000\n"),
      ]))
    // File pages can be dropped.
    #expect(room.byteCount == 3500 && room.limit.hasSuffix("/outer"))
  }

  @Test func swapOfAGroup() throws {
    let room = try #require(
      Self.room([
        Self.machine, ("proc/self/cgroup", "0::/g\n"),
        ("sys/fs/cgroup/g/memory.max", "5000\n"), ("sys/fs/cgroup/g/memory.current", "6000\n"),
        ("sys/fs/cgroup/g/memory.swap.max", "300\n"),
        ("sys/fs/cgroup/g/memory.swap.current", "100\n"),
      ]))
    #expect(room.byteCount == 200)
  }

  @Test func theOldInterface() throws {
    let room = try #require(
      Self.room([
        Self.machine, ("proc/self/cgroup", "5:cpu:/x\n4:memory:/g\n0::/\n"),
        ("sys/fs/cgroup/memory/g/memory.limit_in_bytes", "9000\n"),
        ("sys/fs/cgroup/memory/g/memory.usage_in_bytes", "8000\n"),
        ("sys/fs/cgroup/memory/g/memory.stat", "total_inactive_file 500\ntotal_active_file 0\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
      ]))
    #expect(room.byteCount == 1500)
  }
}
