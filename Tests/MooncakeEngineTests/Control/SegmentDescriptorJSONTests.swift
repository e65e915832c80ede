import MooncakeBase
import MooncakeEngine
import Testing

struct SegmentDescriptorJSONTests {
  private let stock = """
    {"name":"10.0.0.5:15321","protocol":"tcp","tcp_data_host":"10.0.0.5","tcp_data_port":15777,
     "tcp_proto_version":2,"rdma_server_name":"","timestamp":"2026-08-22 10:00:00.000001",
     "buffers":[{"name":"10.0.0.5:15321","addr":139637976793088,"length":1048576}]}
    """

  @Test func parsesAStockDescriptor() throws {
    let descriptor = try SegmentDescriptor(json: stock)
    #expect(
      descriptor
        == SegmentDescriptor(
          name: "10.0.0.5:15321", tcpDataHost: "10.0.0.5", tcpDataPort: 15777,
          buffers: [
            RemoteBuffer(
              address: 139_637_976_793_088, length: 1_048_576, access: [.remoteRead, .remoteWrite])
          ]))
  }

  @Test func roundTrip() throws {
    let original = SegmentDescriptor(
      name: "[::1]:9 \"x\"", tcpDataHost: "::1", tcpDataPort: 65535, incarnation: 0x00AB,
      buffers: [
        RemoteBuffer(address: 1, length: 1, access: .remoteRead),
        RemoteBuffer(address: 9_007_199_254_740_993, length: 3, access: .remoteWrite),
        RemoteBuffer(address: .max - 1, length: 1, access: [.remoteRead, .remoteWrite]),
      ])
    #expect(try SegmentDescriptor(json: original.json()) == original)
    let empty = SegmentDescriptor(name: "a:1")
    #expect(try SegmentDescriptor(json: empty.json()) == empty)
  }

  /// The members that Mooncake reads, in the types that it expects.
  @Test func publishedShape() throws {
    let descriptor = SegmentDescriptor(
      name: "a:1", tcpDataHost: "a", tcpDataPort: 2,
      buffers: [
        RemoteBuffer(address: 4096, length: 8, access: [.remoteRead, .remoteWrite]),
        RemoteBuffer(address: 8192, length: 8, access: .local),
        RemoteBuffer(address: 12288, length: 8, access: .remoteRead),
      ])
    try JSONDocument(parsing: descriptor.json()).read { root in
      #expect(root["name"]?.string == "a:1")
      #expect(root["protocol"]?.string == "tcp")
      #expect(root["tcp_data_host"]?.string == "a")
      #expect(root["tcp_data_port"]?.unsigned == 2)
      #expect(root["tcp_proto_version"]?.unsigned == 2)
      #expect(root["rdma_server_name"]?.string == "")
      #expect(root["timestamp"]?.string?.utf8.count == 26)
      #expect(root["mooncake_incarnation"] == nil)
      let buffers = try #require(root["buffers"].map { Array($0.elements) })
      #expect(buffers.map { $0["addr"]?.unsigned } == [4096, 12288])
      #expect(buffers.allSatisfy { $0["name"]?.string == "a:1" && $0["length"]?.unsigned == 8 })
      #expect(buffers[0]["mooncake_access"] == nil)
      #expect(buffers[1]["mooncake_access"]?.unsigned == 1)
    }
  }

  @Test func buffersComeSorted() throws {
    let descriptor = try SegmentDescriptor(
      json: #"""
        {"name":"n","protocol":"tcp","buffers":[{"name":"n","addr":30,"length":1},
        {"name":"n","addr":10,"length":1},{"name":"n","addr":20,"length":1}]}
        """#)
    #expect(descriptor.buffers.map(\.address) == [10, 20, 30])
  }

  @Test func absentFieldsHaveTheirOldMeaning() throws {
    let descriptor = try SegmentDescriptor(json: #"{"name":"n","protocol":"tcp"}"#)
    #expect(descriptor.tcpProtocolVersion == 1)
    #expect(descriptor.tcpDataPort == 0)
    #expect(descriptor.tcpDataHost == "")
    #expect(descriptor.incarnation == 0)
    #expect(descriptor.buffers.isEmpty)
  }

  @Test func rdmaAndMixedProtocols() throws {
    let rdma = try SegmentDescriptor(
      json: #"""
        {"name":"hostA","protocol":"rdma","tcp_data_port":0,"tcp_proto_version":1,
        "devices":[{"name":"mlx5_0","lid":0,"gid":"00:00"}],
        "priority_matrix":{"cpu:0":[["mlx5_0"],[]]},
        "buffers":[{"name":"cpu:0","addr":139637976793088,"length":1048576,
        "rkey":[4711],"lkey":[4711]}]}
        """#)
    #expect(rdma.protocolName == "rdma" && rdma.tcpDataPort == 0 && rdma.buffers.count == 1)
    let mixed = try SegmentDescriptor(json: #"{"name":"n","protocol":["rdma","tcp"]}"#)
    #expect(mixed.protocolName == "tcp")
    let cxl = try SegmentDescriptor(
      json: #"{"name":"n","protocol":"cxl","buffers":[{"name":"n","offset":0,"length":1}]}"#)
    #expect(cxl.protocolName == "cxl" && cxl.buffers.isEmpty)
  }

  @Test func nullMeansNotYet() {
    do {
      _ = try SegmentDescriptor(json: "null\n")
      Issue.record("accepted")
    } catch {
      #expect(error.code == .notFound)
    }
  }

  private static let hostile: [String] = {
    let head = #"{"name":"n","protocol":"tcp","#
    let buffers = [
      #"{}"#, #"null"#, #"1"#, #""x""#, #"[]"#,
      #"{"addr":1,"length":1}"#, #"{"name":"","addr":1,"length":1}"#,
      #"{"name":1,"addr":1,"length":1}"#, #"{"name":"n","length":1}"#, #"{"name":"n","addr":1}"#,
      #"{"name":"n","addr":0,"length":1}"#, #"{"name":"n","addr":1,"length":0}"#,
      #"{"name":"n","addr":-1,"length":1}"#, #"{"name":"n","addr":1,"length":-1}"#,
      #"{"name":"n","addr":1.5,"length":1}"#, #"{"name":"n","addr":"1","length":1}"#,
      #"{"name":"n","addr":18446744073709551616,"length":1}"#,
      #"{"name":"n","addr":1e30,"length":1}"#,
      #"{"name":"n","addr":18446744073709551615,"length":1}"#,
      #"{"name":"n","addr":2,"length":18446744073709551614}"#,
      #"{"name":"n","addr":1,"length":1,"mooncake_access":0}"#,
      #"{"name":"n","addr":1,"length":1,"mooncake_access":4}"#,
      #"{"name":"n","addr":1,"length":1,"mooncake_access":"1"}"#,
    ]
    return buffers.map { "\(head)\"buffers\":[{\"name\":\"n\",\"addr\":5,\"length\":1},\($0)]}" }
      + [
        "", "{", "[]", "1", "\"n\"", "{}", #"{"name":"n"}"#, #"{"protocol":"tcp"}"#,
        #"{"name":"","protocol":"tcp"}"#, #"{"name":7,"protocol":"tcp"}"#,
        #"{"name":"n","protocol":7}"#, #"{"name":"n","protocol":[]}"#,
        #"{"name":"n","protocol":""}"#, #"{"name":"n","protocol":["tcp",7]}"#,
        #"{"name":"n","protocol":{}}"#,
        head + #""buffers":{}}"#, head + #""buffers":7}"#, head + #""buffers":null}"#,
        head + #""tcp_data_port":65536}"#, head + #""tcp_data_port":-1}"#,
        head + #""tcp_data_port":"1"}"#, head + #""tcp_data_port":1.5}"#,
        head + #""tcp_proto_version":-1}"#, head + #""tcp_proto_version":99999999999}"#,
        head + #""tcp_proto_version":18446744073709551616}"#, head + #""tcp_data_host":7}"#,
        head + #""mooncake_incarnation":7}"#, head + #""mooncake_incarnation":"123"}"#,
        head + #""mooncake_incarnation":"+123456789abcdef"}"#,
        head + #""mooncake_incarnation":"123456789abcdefg"}"#,
        head + #""mooncake_sections":[]}"#, head + #""mooncake_sections":"{}"}"#,
        head + #""mooncake_sections":{"a":{}}}"#, head + #""mooncake_sections":{"a":null}}"#,
        head + #""mooncake_sections":{"":"x"}}"#,
        head + #""mooncake_sections":{"a":"x","a":"y"}}"#, head + sections(17),
      ]
  }()

  @Test(arguments: hostile)
  func rejects(json: String) {
    do {
      _ = try SegmentDescriptor(json: json)
      Issue.record("accepted")
    } catch {
      #expect(error.code == .protocolViolation)
      #expect(!error.message.isEmpty)
    }
  }

  /// Every prefix of a valid text is refused without a crash.
  @Test func everyPrefixIsRefused() {
    let bytes = Array(stock.utf8)
    for length in 0..<bytes.count {
      let prefix = String(decoding: bytes[..<length], as: UTF8.self)
      #expect(throws: MooncakeError.self) { try SegmentDescriptor(json: prefix) }
    }
  }

  /// The end of a descriptor with so many sections.
  private static func sections(_ count: Int) -> String {
    let members = (0..<count).map { #""s\#($0)":"x""# }.joined(separator: ",")
    return #""mooncake_sections":{\#(members)}}"#
  }

  /// Sections come back as they were, whatever their text is.
  @Test func sections() throws {
    var descriptor = SegmentDescriptor(name: "a:1")
    descriptor.sections = ["cq": #"{"keys":"\u0000\"","n":[1]}"#, "é": "", "x": "{"]
    #expect(try SegmentDescriptor(json: descriptor.json()) == descriptor)
    let most = try SegmentDescriptor(
      json: #"{"name":"n","protocol":"tcp","# + Self.sections(16))
    #expect(most.sections.count == SegmentDescriptor.maximumSectionCount)
  }

  @Test func manyBuffers() throws {
    let buffers = (1...20_000).map {
      RemoteBuffer(
        address: UInt64($0) << 20, length: 1 << 20, access: [.remoteRead, .remoteWrite])
    }
    let descriptor = SegmentDescriptor(name: "a:1", buffers: buffers)
    #expect(try SegmentDescriptor(json: descriptor.json()) == descriptor)
  }
}
