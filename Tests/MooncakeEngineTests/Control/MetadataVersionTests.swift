import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Testing

/// `metadata_version`, by which Mooncake's releases from 0.3.14 on tell new texts from old ones.
struct MetadataVersionTests {
  private func version(_ segment: LocalSegment) -> UInt64 {
    MetadataDirectory.metadataVersion(in: segment.json)
  }

  @Test func growsWithEveryChange() throws {
    let segment = LocalSegment(identity: SegmentDescriptor(name: "a", incarnation: 7))
    var last = version(segment)
    #expect(last > 1_700_000_000_000_000)
    #expect(version(segment) == last)
    for index in 1...100 {
      let range = RemoteBuffer(address: UInt64(index) << 20, length: 1, access: .remoteRead)
      try segment.buffers.insert([.init(range: range, location: "*")])
      let next = version(segment)
      #expect(next > last)
      last = next
    }
    // A former owner's clock was ahead.
    segment.renewText(after: last + 5_000_000)
    #expect(version(segment) > last + 5_000_000)
    // A time that no clock can show is ignored.
    segment.renewText(after: .max)
    #expect(version(segment) < last + 86_400_000_000)
    #expect(version(segment) > last)
  }

  @Test func olderTextsAreKnown() throws {
    var one = SegmentDescriptor(name: "a", tcpDataHost: "h", tcpDataPort: 1, incarnation: 7)
    one.metadataVersion = 5
    var other = one
    #expect(!one.isOlder(than: other))
    other.metadataVersion = 6
    #expect(one.isOlder(than: other) && !other.isOlder(than: one))
    // Another process starts anew, whatever its clock says; older releases have no version.
    other.incarnation = 8
    #expect(!one.isOlder(than: other))
    other.incarnation = 7
    other.tcpDataPort = 2
    #expect(!one.isOlder(than: other))
    other.tcpDataPort = 1
    one.metadataVersion = 0
    #expect(!one.isOlder(than: other))
    other.metadataVersion = 9
    #expect(try SegmentDescriptor(json: other.json()) == other)
  }

  /// A process that takes over a name counts as newer, even if its predecessor's clock was ahead.
  @Test func successorsAreNewer() throws {
    let server = try MetadataServer()
    defer { server.stop() }
    let service = try MetadataServices.open(MetadataURI(parsing: server.uri))
    let call = Call(until: .after(milliseconds: 5000))
    let ahead = version(LocalSegment(identity: SegmentDescriptor(name: "a"))) + 60_000_000
    for key in ["mooncake/ram/target", "mooncake/rpc_meta/target"] {
      let text = "{\"metadata_version\":\(ahead)}"
      try service.put(MetadataEntry(key: key, value: text), lease: nil, call)
    }
    let engine = try makeEngine {
      $0.metadataURI = server.uri
      $0.name = "target"
    }
    defer { engine.close() }
    for key in ["mooncake/ram/target", "mooncake/rpc_meta/target"] {
      let text = try #require(try service.get(key, call))
      #expect(MetadataDirectory.metadataVersion(in: text) > ahead)
    }
  }
}
