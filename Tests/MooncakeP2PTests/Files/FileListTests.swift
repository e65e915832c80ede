import MooncakeBase
import MooncakeEngine
import MooncakeP2P
import Testing

@Suite struct FileListTests {
  /// A manifest with these attributes whose buffers have these sizes.
  private static func manifest(_ attributes: String, sizes: [UInt64] = [1]) throws -> Manifest {
    let layout = try ShardLayout(bufferSizes: sizes, shardBytes: 1 << 20)
    let digests = Array(repeating: Digest(high: 0, low: 0), count: layout.shardCount)
    return try Manifest(layout: layout, digests: digests, attributes: Array(attributes.utf8))
  }

  private func refusal(_ attributes: String, sizes: [UInt64] = [1]) throws -> String {
    let manifest = try Self.manifest(attributes, sizes: sizes)
    let error = #expect(throws: MooncakeError.self) { try FileList(parsing: manifest) }
    #expect(error?.code == .protocolViolation)
    return error?.message ?? ""
  }

  private static func list(_ paths: [String]) -> String {
    let files = paths.map { #"{"path":"\#($0)","size":1}"# }
    return #"{"files":["# + files.joined(separator: ",") + "]}"
  }

  @Test func thereAndBack() throws {
    let list = try FileList([
      .init(path: "config.json", size: 7),
      .init(path: "empty", size: 0),
      .init(path: "weights/a \"b\" ü.bin", size: 1 << 34, isExecutable: true),
    ])
    let manifest = try Self.manifest(
      String(decoding: list.json, as: UTF8.self), sizes: [7, 1 << 34])
    #expect(try FileList(parsing: manifest) == list)
  }

  @Test func pathsThatLeaveTheDirectory() throws {
    for path in [
      "/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "./x", "a/./b", "a//b", "a/", "",
    ] {
      #expect(try refusal(Self.list([path])).contains("path"), "\(path)")
    }
  }

  @Test func pathsThatConfuse() throws {
    #expect(try refusal(Self.list([#"a\u001b[2Jb"#])).contains("control"))
    #expect(try !refusal(Self.list([#"a\u001b[2Jb"#])).contains("\u{1B}"))
    #expect(try refusal(Self.list([#"a\u007f"#])).contains("control"))
    #expect(try refusal(Self.list([#"a\u0000b"#])).contains("NUL"))
    #expect(try refusal(Self.list([String(repeating: "x", count: 256)])).contains("too long"))
    let deep = Array(repeating: "d", count: 65).joined(separator: "/")
    #expect(try refusal(Self.list([deep])).contains("too deep"))
    let long = Array(repeating: String(repeating: "y", count: 200), count: 30)
    #expect(try refusal(Self.list([long.joined(separator: "/")])).contains("bytes"))
  }

  @Test func filesInEachOthersWay() throws {
    #expect(try refusal(Self.list(["a", "b", "a"]), sizes: [1, 1, 1]).contains("twice"))
    #expect(
      try refusal(Self.list(["a/b", "a"]), sizes: [1, 1]).contains("a file and a directory"))
    #expect(try refusal(Self.list(["x/y/z", "x/y"]), sizes: [1, 1]).contains("x/y"))
  }

  @Test func namesOfWhatAGetWorksWith() throws {
    for path in [".mooncake-get-data/w", "a/.mooncake-get-x", ".mooncake-get-"] {
      #expect(try refusal(Self.list([path])).contains(".mooncake-get-"), "\(path)")
      #expect(throws: MooncakeError.self) { try FileList([.init(path: path, size: 1)]) }
    }
    #expect(try FileList([.init(path: ".mooncake-get", size: 1)]).files.count == 1)
  }

  @Test func filesAreFoundInEachOthersWayInAnyOrder() throws {
    for paths in [["a", "a.b", "a/b"], ["a/b", "a-b", "a"], ["x/y!", "x/y/z", "x/y"]] {
      let sizes = [UInt64](repeating: 1, count: 3)
      #expect(try refusal(Self.list(paths), sizes: sizes).contains("a directory"), "\(paths)")
    }
    #expect(try FileList(["a.b/c", "a", "a-b"].map { .init(path: $0, size: 1) }).files.count == 3)
  }

  @Test func deepPathsCostLittle() throws {
    let tail = (0..<62).map { "d\($0)" }.joined(separator: "/")
    let files = (0..<20_000).map { FileList.File(path: "\($0)/\(tail)/f", size: 1) }
    let error = #expect(throws: MooncakeError.self) { try FileList(files) }
    #expect(error?.message.contains("more than 65536 directories") == true)
    let one = (0..<20_000).map { FileList.File(path: "\(tail)/\($0)", size: 1) }
    #expect(try FileList(one).files.count == 20_000)
  }

  @Test func sizesThatAreNotTheBuffers() throws {
    for sizes in [[2], [1, 1], []] as [[UInt64]] {
      #expect(try refusal(Self.list(["a"]), sizes: sizes).contains("sizes"))
    }
    #expect(try refusal(#"{"files":[{"path":"a","size":-1}]}"#).contains("size"))
    #expect(try refusal(#"{"files":[{"path":"a","size":1.5}]}"#).contains("size"))
    #expect(try refusal(#"{"files":[{"path":"a","size":18446744073709551615}]}"#) != "")
  }

  @Test func whatIsHereIsCheckedToo() throws {
    for path in ["line\nbreak", "../x"] {
      let error = #expect(throws: MooncakeError.self) { try FileList([.init(path: path, size: 1)]) }
      #expect(error?.code == .invalidArgument)
    }
  }

  @Test func whatIsNoList() throws {
    for text in [
      "x", "{}", "[]", "null", #"{"files":{}}"#, #"{"files":[1]}"#, #"{"files":[]}"#,
      #"{"files":[{"path":7,"size":1}]}"#, #"{"files":[{"size":1}]}"#, "\u{0}",
      String(repeating: "[", count: 100_000),
    ] {
      _ = try refusal(text)
    }
  }

  @Test func tooManyFiles() throws {
    let entry = #"{"path":"a","size":0}"#
    let many = Array(repeating: entry, count: FileList.maximumFileCount + 1)
    let text = #"{"files":["# + many.joined(separator: ",") + "]}"
    #expect(try refusal(text, sizes: []).contains("more than"))
  }
}
