import Glibc
import MooncakeMetadata
import MooncakeSystem
import Synchronization
import Testing

/// What a power loss may leave of the last commit on file systems that write blocks in any order,
/// and what it can never take of synced data.
struct MetadataJournalLossTests {
  private typealias Record = MetadataJournal.Record

  /// A journal while a commit is being synced: any block of what was not safe before may be lost.
  private struct Moment {
    var bytes: [UInt8]
    var safeBytes: Int
    var safe: [Record]
    var all: [Record]

    /// Ranges of whole blocks.
    func stretches(of blockBytes: Int, in range: Range<Int>) -> [Range<Int>] {
      let blocks = (range.lowerBound / blockBytes)...((range.upperBound - 1) / blockBytes)
      return blocks.flatMap { first in
        (first...blocks.upperBound).map {
          (first * blockBytes..<($0 + 1) * blockBytes).clamped(to: range)
        }
      }
    }
  }

  /// The contents of blocks that were not written.
  private enum Filling: CaseIterable {
    case zeros, noise, formerFile

    func fill(_ range: Range<Int>, of bytes: inout [UInt8], former: [UInt8]) {
      for index in range {
        bytes[index] =
          switch self {
          case .zeros: 0
          case .noise: .random(in: 1...255)
          case .formerFile: index < former.count ? former[index] : 0xA5
          }
      }
    }
  }

  /// About `byteCount` bytes of changes.
  private static func commit(_ number: Int, byteCount: Int) -> [Record] {
    var records: [Record] = [.grant(lease: UInt64(number + 1), ttlMilliseconds: 9000)]
    var left = byteCount
    while left > 0 {
      let size = [10, 300, 1700][records.count % 3]
      records.append(
        .put(
          key: "\(number)-\(records.count)",
          value: [UInt8](repeating: UInt8(number + 1), count: size), lease: UInt64(number + 1)))
      left -= size
    }
    return records + [.delete(key: "\(number)-1")]
  }

  /// Writes commits after the contents of a folder, and keeps the disk's state at each sync.
  private static func moments(
    _ commits: [[Record]], in folder: JournalFolder, isRewritten: Bool = false
  ) throws -> [Moment] {
    let synced = Lock<[[UInt8]]>([])
    var disk = JournalFolder.fastDisk
    disk.syncData = { file in
      synced.withLock { $0.append(JournalFolder.bytes(of: file)) }
      return 0
    }
    var safe: [Record] = []
    let journal = try MetadataJournal(directory: folder.path, disk: disk) {
      safe.append($0)
      return nil
    }
    var safeBytes = synced.withLock { $0.removeLast() }.count
    if isRewritten {
      try journal.rewrite(safe)
      safeBytes = folder.bytes.count
    }
    var moments: [Moment] = []
    for records in commits {
      for record in records { journal.append(record) }
      try journal.commit { [] }
      let bytes = synced.withLock { $0.removeLast() }
      moments.append(
        Moment(bytes: bytes, safeBytes: safeBytes, safe: safe, all: safe + records))
      safeBytes = bytes.count
      safe += records
    }
    return moments
  }
  private static let markBytes = 38

  private static let commits = (0..<4).map { commit($0, byteCount: 5000) }

  /// A journal, and another one whose old blocks may turn up in it.
  private static func journal(
    isRewritten: Bool = false
  ) throws -> (moments: [Moment], former: [UInt8]) {
    let former = JournalFolder()
    try former.write(commits: [[.delete(key: "x")]] + commits)
    let folder = JournalFolder()
    try folder.write(isRewritten ? commits[0] + [.delete(key: "x")] : [.delete(key: "x")])
    return (try moments(commits, in: folder, isRewritten: isRewritten), former.bytes)
  }

  @Test(arguments: [512, 4096])
  func holesInWhatWasNeverSafeLoseNothingThatWas(blockBytes: Int) throws {
    let (moments, former) = try Self.journal()
    let folder = JournalFolder()
    for moment in moments {
      for range in moment.stretches(of: blockBytes, in: moment.safeBytes..<moment.bytes.count) {
        for filling in Filling.allCases {
          var bytes = moment.bytes
          filling.fill(range, of: &bytes, former: former)
          folder.bytes = bytes
          let found = try folder.read()
          try expect(found, from: moment, "\(range), \(filling)")
          let kept = folder.bytes
          #expect(kept.starts(with: moment.bytes[..<moment.safeBytes]))
          // The next start finds the same and cuts nothing.
          #expect(try folder.read() == found)
          #expect(folder.bytes == kept)
        }
      }
    }
  }

  private func expect(
    _ found: [Record], from moment: Moment, _ what: String,
    _ location: SourceLocation = #_sourceLocation
  ) throws {
    #expect(found.starts(with: moment.safe), "\(what)", sourceLocation: location)
    #expect(moment.all.starts(with: found), "\(what)", sourceLocation: location)
  }

  @Test func anyBlocksMayBeLostTogether() throws {
    let (moments, former) = try Self.journal()
    let folder = JournalFolder()
    for round in 0..<300 {
      let moment = moments[round % moments.count]
      var bytes = moment.bytes
      let range = moment.safeBytes..<bytes.count
      for block in (range.lowerBound / 512)...(range.upperBound / 512) where Bool.random() {
        Filling.allCases.randomElement()!.fill(
          (block * 512..<(block + 1) * 512).clamped(to: range), of: &bytes, former: former)
      }
      // It may also have got another length.
      folder.bytes = Array(bytes[..<Int.random(in: range.lowerBound...range.upperBound)])
      try expect(try folder.read(), from: moment, "round \(round)")
    }
  }

  @Test(arguments: [false, true])
  func holesInWhatWasSafeStopTheStart(isRewritten: Bool) throws {
    let (moments, former) = try Self.journal(isRewritten: isRewritten)
    let folder = JournalFolder()
    for moment in moments {
      for block in 0..<(moment.safeBytes / 512 + 1) {
        for filling in Filling.allCases {
          var bytes = moment.bytes
          let range = (block * 512..<(block + 1) * 512).clamped(to: 0..<bytes.count)
          // Holes where unsynced data begins, and the head of another file, are tested elsewhere.
          if range.lowerBound >= moment.safeBytes { continue }
          if block == 0 && filling == .formerFile { continue }
          filling.fill(range, of: &bytes, former: former)
          // The other file has the same bytes in the same places.
          if bytes == moment.bytes { continue }
          folder.bytes = bytes
          let text = try #require(folder.refusal(), "\(range) of \(moment.safeBytes), \(filling)")
          #expect(text.contains("move the file away"))
          #expect(folder.bytes == bytes)
        }
      }
    }
  }

  @Test func rewrittenFilesAreSafeAsAWhole() throws {
    let (moments, _) = try Self.journal(isRewritten: true)
    let folder = JournalFolder()
    let moment = moments[0]
    let headBytes = MetadataJournalFormat.Head.byteCount
    for count in stride(from: headBytes + 1, to: moment.bytes.count, by: 7) {
      for zeroCount in [0, 600] {
        folder.bytes = moment.bytes[..<count] + [UInt8](repeating: 0, count: zeroCount)
        if count < moment.safeBytes {
          #expect(folder.refusal()?.contains("according to byte 0") == true, "\(count)")
        } else {
          try expect(try folder.read(), from: moment, "\(count)")
        }
      }
    }
    // Damage is found even with nothing after it.
    for index in stride(from: 0, to: moment.safeBytes, by: 5) {
      var bytes = Array(moment.bytes[..<moment.safeBytes])
      bytes[index] ^= 0x10
      folder.bytes = bytes
      #expect(folder.refusal() != nil, "\(index)")
    }
  }

  @Test func aSecondCrashBringsNothingBack() throws {
    let (moments, former) = try Self.journal()
    let next = Self.commit(7, byteCount: 5000)
    for moment in moments.prefix(2) {
      let range = moment.safeBytes..<moment.bytes.count
      for hole in moment.stretches(of: 512, in: range).filter({ $0.count <= 512 }) {
        let folder = JournalFolder()
        var bytes = moment.bytes
        Filling.zeros.fill(hole, of: &bytes, former: former)
        folder.bytes = bytes
        let second = try Self.moments([next], in: folder)[0]
        // What was cut off is still on disk wherever the new commit is not.
        for lost in second.stretches(of: 512, in: second.safeBytes..<second.bytes.count) {
          var now = second.bytes
          for index in lost { now[index] = index < bytes.count ? bytes[index] : 0 }
          folder.bytes = now
          try expect(try folder.read(), from: second, "\(hole) and \(lost)")
        }
      }
    }
  }

  @Test(arguments: [0, 1, 21])
  func changesAfterACrashAreNotMixedWithThoseBefore(keptCount: Int) throws {
    // Each record lands where the previous commit had one.
    let puts = { (value: UInt8) in
      (0..<40).map { Record.put(key: "\($0 + 10)", value: [value, value], lease: 0) }
    }
    let recordBytes = 42
    let filler = keptCount < 2 ? [] : [Record.grant(lease: 1, ttlMilliseconds: 1000)]
    for lostCount in 1..<40 {
      let folder = JournalFolder()
      try folder.write([.delete(key: "x")])
      var moment = try Self.moments([[.delete(key: "y")], puts(1)], in: folder)[1]
      let end = moment.safeBytes + Self.markBytes + 40 * recordBytes
      #expect(moment.bytes.count == end)
      // In the mark, in the first put, or in a later one.
      moment.bytes[keptCount == 0 ? moment.safeBytes : end - (41 - keptCount) * recordBytes] ^= 1
      folder.bytes = moment.bytes
      let again = try Self.moments([filler + puts(2)], in: folder)[0]
      #expect(again.safe.count == 2 + max(0, keptCount - 1))
      var now = again.bytes
      let start = end - lostCount * recordBytes
      if start < again.safeBytes + Self.markBytes { continue }
      now[start...] = moment.bytes[start...]
      folder.bytes = now
      try expect(try folder.read(), from: again, "\(lostCount)")
    }
  }

  @Test func valuesThatLookLikeRecordsTellNothing() throws {
    let folder = JournalFolder()
    try folder.write(commits: Self.commits)
    let value = folder.bytes
    for shift in 0..<40 {
      folder.bytes = value
      let moment = try Self.moments(
        [
          [
            .put(key: "small", value: [UInt8](repeating: 1, count: 600 + shift), lease: 0),
            .put(key: "large", value: value + value, lease: 0),
          ]
        ], in: folder)[0]
      var bytes = moment.bytes
      bytes[moment.safeBytes + 50] ^= 1
      folder.bytes = bytes
      try expect(try folder.read(), from: moment, "\(shift)")
    }
  }

  @Test func marksAreMissedByNobody() throws {
    // A disk without room for the mark.
    let folder = JournalFolder()
    try folder.write(commits: Self.commits)
    let bytes = folder.bytes
    folder.bytes = Array(bytes.dropLast(Self.markBytes))
    #expect(try folder.read() == Self.commits.flatMap { $0 })
    // It is restored, and later starts leave the file as it is.
    for _ in 0..<2 {
      #expect(folder.bytes.count == bytes.count)
      #expect(try folder.read() == Self.commits.flatMap { $0 })
    }
  }

  @Test func formerFilesAreWrittenAnewWithTheFirstChange() throws {
    let folder = JournalFolder()
    var bytes = FormerJournal.head
    for record in Self.commits[0] { FormerJournal.encode(record, into: &bytes) }
    folder.bytes = bytes
    #expect(try folder.read() == Self.commits[0])
    #expect(folder.bytes == bytes)
    do {
      let journal = try MetadataJournal(directory: folder.path) { _ in nil }
      journal.append(.delete(key: "x"))
      try journal.commit { Self.commits[0] + [.delete(key: "x")] }
      #expect(folder.bytes.starts(with: "mooncake metadata 3\n".utf8))
      journal.append(.delete(key: "y"))
      try journal.commit { [] }
    }
    #expect(try folder.read() == Self.commits[0] + [.delete(key: "x"), .delete(key: "y")])
  }
}
