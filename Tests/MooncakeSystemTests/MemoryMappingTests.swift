import CLinux
import Glibc
import MooncakeSystem
import Testing

struct MemoryMappingTests {
  @Test func anonymousMemoryIsZeroedWholePages() throws {
    let page = MemoryMapping.pageBytes
    for count in [1, page - 1, page, page + 1, 3 << 20] {
      let mapping = try MemoryMapping.anonymous(byteCount: count)
      #expect(mapping.count >= count && mapping.count % page == 0 && mapping.count < count + page)
      #expect(UInt(bitPattern: mapping.address) % UInt(page) == 0)
      #expect(mapping.bytes.first == 0 && mapping.bytes.last == 0)
      mapping.bytes[count - 1] = 1
    }
  }

  @Test(arguments: [0, -1, Int.min, Int.max, Int.max - 4095])
  func sizesThatCannotBe(_ count: Int) {
    #expect(throws: Errno(ENOMEM)) { _ = try MemoryMapping.anonymous(byteCount: count) }
  }

  @Test func sharedMappingsSeeEachOther() throws {
    let file = FileDescriptor(owning: memfd_create("test", 0))
    #expect(ftruncate(file.rawValue, 4096) == 0)
    let writer = try MemoryMapping.shared(file.rawValue, byteCount: 4096, writable: true)
    let reader = try MemoryMapping.shared(file.rawValue, byteCount: 4096, writable: false)
    writer.bytes[100] = 42
    #expect(reader.bytes[100] == 42)
    #expect(throws: Errno(EBADF)) {
      _ = try MemoryMapping.shared(-1, byteCount: 4096, writable: false)
    }
  }

  @Test func theEndOfItsLifeUnmaps() throws {
    let address: UnsafeMutableRawPointer
    do {
      let mapping = try MemoryMapping.anonymous(byteCount: 1 << 20)
      address = mapping.address
    }
    var resident: UInt8 = 0
    #expect(mincore(address, 4096, &resident) == -1 && errno == ENOMEM)
  }

  @Test(arguments: [(2 << 20) - 1, 2 << 20, (5 << 20) + 4096])
  func sharedMemoryWithHugePages(_ count: Int) throws {
    let file = try MemoryFile(name: "test", byteCount: count)
    let owner = try file.map(writable: true)
    try owner.prefer(node: 0)
    owner.gatherHugePages()
    #expect(owner.bytes.allSatisfy { $0 == 0 })
    let other = try file.map(writable: false)
    if owner.count >= 2 << 20 {
      #expect(UInt(bitPattern: owner.address) % (2 << 20) == 0)
      #expect(UInt(bitPattern: other.address) % (2 << 20) == 0)
    }
    owner.bytes[owner.count - 1] = 42
    #expect(other.bytes[other.count - 1] == 42)
  }

  @Test func nodesThatCannotBe() throws {
    let mapping = try MemoryMapping.anonymous(byteCount: 4096)
    #expect(throws: Errno(EINVAL)) { try mapping.prefer(node: .max) }
  }
}
