import MooncakeSystem
import Testing

@Suite struct ClockTests {
  @Test func elapsedTime() {
    #expect(Clock.elapsed(since: 3, until: 5) == 2)
    #expect(Clock.elapsed(since: 5, until: 5) == 0)
    let start = Clock.now()
    #expect(Clock.elapsed(since: start) <= Clock.now() &- start)
  }

  @Test func clockThatGoesBack() {
    #expect(Clock.elapsed(since: 5, until: 3) == 0)
    #expect(Clock.elapsed(since: .max) == 0)
  }
}
