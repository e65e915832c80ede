import CompletionQueueTransport
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Testing

struct CQSectionTests {
  private static let good = CQSection(
    process: 7, file: 8, identity: .max, deviceCount: 2, keys: [1, 0xFFFF_FFFF, 0x1234_ABCD, 0])

  @Test func roundTrip() throws {
    let text = Self.good.text
    #expect(try CQSection(parsing: text, bufferCount: 2) == Self.good)
    #expect(text.hasSuffix(#""keys":"00000001ffffffff1234abcd00000000"}"#))
  }

  private static let malformed = [
    "", "7", "[]", "{}", "null", "{",
    #"{"process":1,"file":1,"identity":1,"devices":0,"keys":""}"#,
    #"{"process":1,"file":1,"identity":1,"devices":9,"keys":""}"#,
    #"{"process":-1,"file":1,"identity":1,"devices":1,"keys":"00000000"}"#,
    #"{"process":1,"file":1,"identity":"1","devices":1,"keys":"00000000"}"#,
    #"{"process":1,"file":1,"identity":1,"devices":1,"keys":"0000000"}"#,
    #"{"process":1,"file":1,"identity":1,"devices":1,"keys":"000000000"}"#,
    #"{"process":1,"file":1,"identity":1,"devices":1,"keys":"0000000x"}"#,
    #"{"process":1,"file":1,"identity":1,"devices":1,"keys":[1]}"#,
  ]

  /// A bad section costs the peer this transport: the error says so, and other transports are
  /// not concerned.
  @Test(arguments: malformed)
  func rejects(_ text: String) throws {
    let transport = try CQTransport(makeContext())
    defer { _ = transport.stop(until: .never) }
    var descriptor = SegmentDescriptor(
      name: "peer",
      buffers: [RemoteBuffer(address: 4096, length: 4096, access: .remoteRead)])
    descriptor.sections[CQTransport.name] = text
    descriptor = try SegmentDescriptor(json: descriptor.json())
    #expect(descriptor.sections[CQTransport.name] == text)
    do throws(MooncakeError) {
      _ = try transport.connect(
        to: descriptor, former: [], for: SegmentLink("peer", nil), deadline: .never)
      Issue.record("accepted")
    } catch {
      #expect(error.code == .protocolViolation)
      #expect(error.message.contains("malformed section of completion queues"))
    }
  }
}
