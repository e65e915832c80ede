import MooncakeBase
import MooncakeEngine
import Testing

/// What transports add to the text that peers read.
struct LocalSegmentTests {
  private func insert(_ count: Int, into segment: LocalSegment, from first: Int = 1) throws {
    try segment.buffers.insert(
      (first..<first + count).map {
        let range = RemoteBuffer(address: UInt64($0) << 20, length: 1, access: .remoteRead)
        return BufferTable.Buffer(range: range, location: "*")
      })
  }

  /// Told again whenever the buffers change, and after a transport has come.
  @Test func describersSeeTheBuffers() throws {
    let segment = LocalSegment(identity: SegmentDescriptor(name: "a"))
    try insert(1, into: segment)
    _ = segment.json
    segment.add(.init { $0.sections["x"] = "\($0.buffers.map(\.address))" })
    func section() throws -> String? { try SegmentDescriptor(json: segment.json).sections["x"] }
    #expect(try section() == "[1048576]")
    try insert(1, into: segment, from: 2)
    #expect(try section() == "[1048576, 2097152]")
    _ = segment.buffers.remove([1 << 20])
    #expect(try section() == "[2097152]" && segment.descriptor.sections["x"] == "[2097152]")
  }

  /// Keys count when the text must fit into one message.
  @Test func whatIsAddedForEachBufferCounts() throws {
    for (bytesPerBuffer, fits) in [(0, true), (100, true), (1000, false)] {
      let segment = LocalSegment(identity: SegmentDescriptor(name: "a"))
      let describer = LocalSegment.Describer(bytesPerBuffer: bytesPerBuffer) { descriptor in
        descriptor.sections["x"] = String(
          repeating: "k", count: bytesPerBuffer * descriptor.buffers.count)
      }
      try insert(1500, into: segment)
      func code(with more: [LocalSegment.Describer]) -> MooncakeError.Code? {
        failureCode { () throws(MooncakeError) in try segment.checkFitsMessage(with: more) }
      }
      #expect(code(with: []) == nil)
      #expect(code(with: [describer]) == (fits ? nil : .full), "\(bytesPerBuffer)")
      segment.add(describer)
      #expect((segment.json.utf8.count < 1 << 20) == fits)
      #expect(code(with: []) == (fits ? nil : .full), "\(bytesPerBuffer)")
    }
  }
}
