import MooncakeBase
import Testing

@Suite struct LogLimiterTests {
  private let second: UInt64 = 1_000_000_000
  private let kind = LogLimiter.Kind("a", 1)
  private let other = LogLimiter.Kind("b", 2)

  /// How many lines are logged of 1000 a second in the given time.
  private func count(
    _ limiter: inout LogLimiter, _ kind: LogLimiter.Kind, seconds: UInt64,
    peer: (UInt64) -> String = { _ in "" }
  ) -> Int {
    var admitted = 0
    for index in 0..<seconds * 1000 {
      if limiter.admits(kind, peer(index), now: index * second / 1000) { admitted += 1 }
    }
    return admitted
  }

  @Test func aFloodOfOneKindIsAFewLines() {
    var limiter = LogLimiter()
    let admitted = count(&limiter, kind, seconds: 10)
    let isOtherAdmitted = limiter.admits(other, "", now: 10 * second)
    #expect(admitted == LogLimiter.kindCapacity + 1)
    #expect(isOtherAdmitted)
  }

  @Test func onePeerDoesNotSilenceOthers() {
    var limiter = LogLimiter()
    let admitted = count(&limiter, kind, seconds: 9) { _ in "loud" }
    let isQuietAdmitted = limiter.admits(kind, "quiet", now: 9 * second)
    #expect(admitted == LogLimiter.peerCapacity)
    #expect(isQuietAdmitted)
  }

  @Test func manyPeersShareTheKindsSupply() {
    var limiter = LogLimiter()
    let admitted = count(&limiter, kind, seconds: 10) { "peer \($0)" }
    #expect(admitted == LogLimiter.kindCapacity + 1)
  }

  @Test func aQuietTimeGivesTheSupplyBack() {
    var limiter = LogLimiter()
    _ = count(&limiter, kind, seconds: 10)
    var admitted = 0
    let late = 10 * second + LogLimiter.kindInterval * UInt64(LogLimiter.kindCapacity)
    for _ in 0..<100 where limiter.admits(kind, "", now: late) { admitted += 1 }
    #expect(admitted == LogLimiter.kindCapacity)
  }

  /// A thread read the clock before another noted its line.
  @Test func whatStayedOutLaterIsNotOld() {
    var limiter = LogLimiter()
    for _ in 0...LogLimiter.kindCapacity { _ = limiter.admits(kind, "", now: second) }
    #expect(limiter.reports(now: second - 1) == [])
    let last = limiter.reports(now: second - 1, isEnd: true)
    #expect(last.count == 1 && last.first?.hasPrefix("left out in 0 ms: 1 lines") == true)
  }

  @Test func theNextLineTellsHowManyStayedOut() {
    var limiter = LogLimiter()
    for _ in 0..<LogLimiter.kindCapacity + 5 { _ = limiter.admits(kind, "", now: 0) }
    let isAdmitted = limiter.admits(kind, "", now: LogLimiter.kindInterval)
    let notes = [limiter.note(kind, "text"), limiter.note(kind, "text")]
    #expect(isAdmitted)
    #expect(notes == ["(5 similar lines left out)", nil])
  }

  @Test func leftOutLinesAreToldByThemselves() {
    var limiter = LogLimiter()
    _ = limiter.admits(kind, "", now: 0)
    _ = limiter.note(kind, "an example")
    for _ in 0..<LogLimiter.kindCapacity + 5 { _ = limiter.admits(kind, "", now: 0) }
    let reports = [
      limiter.reports(now: 1), limiter.reports(now: LogLimiter.reportInterval),
      limiter.reports(now: LogLimiter.reportInterval, isEnd: true),
    ]
    #expect(reports == [[], ["left out in 10000 ms: 6 lines like 'an example'"], []])
  }

  @Test func theEndTellsAtOnce() {
    var limiter = LogLimiter()
    for _ in 0...LogLimiter.kindCapacity { _ = limiter.admits(kind, "", now: 0) }
    let reports = limiter.reports(now: second, isEnd: true)
    #expect(reports.count == 1)
  }
}

@Suite struct PrintableTextTests {
  @Test func plainTextStays() {
    #expect(PrintableText.make("größer: 100 µs, '漢字'") == "größer: 100 µs, '漢字'")
  }

  @Test func controlCharactersAreEscaped() {
    #expect(PrintableText.make("a\nb\r\tc") == "a\\nb\\r\\tc")
    #expect(PrintableText.make("\u{1b}[31m\u{7f}\u{9b}0") == "\\u{1b}[31m\\u{7f}\\u{9b}0")
    #expect(PrintableText.make("\u{202e}gpj\u{2028}") == "\\u{202e}gpj\\u{2028}")
    // Swift sees a carriage return and a newline as one character.
    #expect(PrintableText.make("\r\n") == "\\r\\n")
  }

  @Test func longTextIsCut() {
    let text = PrintableText.make(String(repeating: "ä", count: 100), limit: 20)
    #expect(text == String(repeating: "ä", count: 8) + "...")
    #expect(PrintableText.make(String(repeating: "a", count: 20), limit: 20).utf8.count == 20)
  }

  @Test func errorsArePrintable() {
    let error = MooncakeError(
      .system, "peer \u{1b}]0;x\u{7}\n" + String(repeating: "y", count: 9000))
    #expect(error.message.hasPrefix("peer \\u{1b}]0;x\\u{7}\\nyyy"))
    #expect(error.message.utf8.count <= 8192)
  }
}
