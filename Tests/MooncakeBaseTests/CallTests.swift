import MooncakeBase
import MooncakeSystem
import Testing

@Suite struct CallTests {
  @Test func aLimitOnlyShortens() {
    let call = Call(until: Deadline(nanoseconds: 1000), cancellation: 7)
    #expect(call.within(Deadline(nanoseconds: 500)).deadline == Deadline(nanoseconds: 500))
    #expect(call.within(.never).deadline == Deadline(nanoseconds: 1000))
    #expect(call.within(milliseconds: 1000).deadline == Deadline(nanoseconds: 1000))
    #expect(call.within(.never).cancellation == 7)
  }

  @Test func sleepsUntilTheFirstEnd() throws {
    let event = try EventFD()
    let call = Call(
      until: .after(milliseconds: 20_000), cancellation: event.descriptor.rawValue)
    #expect(!call.sleep(milliseconds: 5))
    #expect(!call.isCanceled && !call.isOver)
    #expect(!call.within(milliseconds: 5).sleep(milliseconds: 20_000))
    event.signal()
    #expect(call.sleep(milliseconds: 20_000))
    #expect(call.isCanceled && call.isOver)
  }

  @Test func withoutADescriptorOnlyTimeEndsIt() {
    #expect(!Call(until: .never).isOver)
    #expect(Call.background.isOver && !Call.background.isCanceled)
    #expect(!Call(until: .after(milliseconds: 5)).sleep(milliseconds: 20_000))
  }
}
