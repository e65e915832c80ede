import Glibc
import MooncakeEngine
import MooncakeSystem
import Testing

/// Peers whose memory cannot be reached at first.
struct SharedMemoryRetryTests {
  /// Attempts rest longer and longer, and there is one at a time.
  @Test func restsGrow() {
    let health = SharedMemoryHealth()
    #expect(!health.isDue && health.failure == nil)
    var rests: [UInt64] = []
    for round in 0..<4 {
      #expect(health.noteFailure("full", isFinal: false) == (round == 0))
      let milliseconds = elapsedMilliseconds {
        while !health.isDue { usleep(200) }
      }
      rests.append(milliseconds)
      #expect(health.beginAttempt() && !health.beginAttempt() && !health.isDue)
    }
    #expect(rests[0] >= 4 && rests[1] >= 9 && rests[2] >= 19 && rests[3] >= 39, "\(rests)")
    #expect(health.failure == "full")
    #expect(health.noteFailure("another user", isFinal: true))
    usleep(100_000)
    #expect(!health.isDue && !health.beginAttempt())
  }
}
