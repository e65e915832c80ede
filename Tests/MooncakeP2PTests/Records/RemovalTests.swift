import MooncakeEngine
import MooncakeP2P
import MooncakeSystem
import Testing

/// Removals in the middle of other operations and the reverse. Each test goes through all calls at
/// which an interruption is possible.
@Suite struct RemovalTests {
  private static let callLimit = 40

  /// Runs `body` with an interruption before each of its calls in turn, until there are no more.
  private func betweenAllCalls(
    _ body: (_ index: Int) throws -> (wasInterrupted: Bool, Void)
  ) throws {
    var count = 0
    while try body(count).wasInterrupted && count < Self.callLimit { count += 1 }
    #expect(count > 3 && count < Self.callLimit)
  }

  @Test func whoStandsMeanwhileIsRemovedToo() throws {
    try betweenAllCalls { index in
      let bench = Bench()
      let service = bench.service()
      let replica = try bench.keeper(service, 1)
      let directory = bench.directory(service)
      replica.put(testRecord("a", isOrigin: false), testCall)
      // It finds no head and puts one, before, during or after the removal.
      bench.interrupt(0, afterCalls: index) {
        _ = try? replica.step()
        return .done
      }
      #expect(try directory.remove("a", testCall))
      let wasInterrupted = bench.endInterruption()
      #expect(try directory.head("a", testCall) == nil, "call \(index)")
      try bench.pass(milliseconds: 2000, replica)
      #expect(try directory.list(prefix: "", testCall).isEmpty, "call \(index)")
      #expect(try directory.allHolders(of: "a", testCall).isEmpty, "call \(index)")
      return (wasInterrupted, ())
    }
  }

  @Test func aFailedPublicationBringsNothingBack() throws {
    try betweenAllCalls { index in
      let bench = Bench()
      let service = bench.service()
      let (origin, replica) = (try bench.keeper(service, 1), try bench.keeper(service, 2))
      let directory = bench.directory(service)
      try origin.publish(testRecord("a"), isCreateOnly: false, testCall)
      replica.put(testRecord("a", isOrigin: false), testCall)
      #expect(try directory.remove("a", testCall))
      try bench.pass(milliseconds: 500, origin)
      bench.interrupt(1, afterCalls: index) {
        bench.setCut(1, true)
        return .unreachable
      }
      let failure = code {
        try origin.publish(testRecord("a"), isCreateOnly: false, testCall)
      }
      let wasInterrupted = bench.endInterruption()
      #expect((failure == nil) == !wasInterrupted)
      // It could not delete its head, so it was published for a while.
      if try directory.head("a", testCall) == nil {
        try bench.pass(milliseconds: 2000, replica)
        bench.setCut(1, false)
        try bench.pass(milliseconds: 4000, replica, origin)
        #expect(try directory.list(prefix: "", testCall).isEmpty, "call \(index)")
        #expect(try directory.allHolders(of: "a", testCall).isEmpty, "call \(index)")
      }
      return (wasInterrupted, ())
    }
  }

  @Test(arguments: [false, true])
  func whatIsPublishedDuringARemovalStays(_ isCreateOnly: Bool) throws {
    try betweenAllCalls { index in
      let bench = Bench()
      let service = bench.service()
      let origin = try bench.keeper(service, 1)
      let directory = bench.directory(service)
      try origin.publish(testRecord("a"), isCreateOnly: false, testCall)
      #expect(try directory.remove("a", testCall))
      try bench.pass(milliseconds: 500, origin)
      bench.interrupt(1, afterCalls: index) {
        _ = try? directory.remove("a", testCall)
        return .done
      }
      try origin.publish(testRecord("a"), isCreateOnly: isCreateOnly, testCall)
      let wasInterrupted = bench.endInterruption()
      // Its head is lost while removals are still remembered.
      let head = try #require(try directory.head("a", testCall), "call \(index)")
      _ = service.delete(directory.headKey("a"), ifIs: head.json)
      try bench.pass(milliseconds: 2000, origin)
      #expect(try directory.list(prefix: "", testCall).map(\.name) == ["a"], "call \(index)")
      #expect(try directory.head("a", testCall)?.version == head.version, "call \(index)")
      return (wasInterrupted, ())
    }
  }

  /// A process that is away meanwhile, and for longer than removals are remembered, finds the mark.
  @Test func aRemovalThatIsRepeatedLeavesItsMark() throws {
    try betweenAllCalls { index in
      let bench = Bench()
      let service = bench.service()
      let origin = try bench.keeper(service, 1)
      let directory = bench.directory(service, 3)
      try origin.publish(testRecord("a"), isCreateOnly: false, testCall)
      try bench.pass(milliseconds: 500, origin)
      bench.setCut(1, true)
      bench.interrupt(3, afterCalls: index) { .unreachable }
      let failure = code { _ = try directory.remove("a", testCall) }
      let wasInterrupted = bench.endInterruption()
      if failure != nil { _ = try directory.remove("a", testCall) }
      try bench.pass(milliseconds: 24 * 3_600_000)
      bench.setCut(1, false)
      try bench.pass(milliseconds: 2000, origin)
      #expect(try directory.list(prefix: "", testCall).isEmpty, "call \(index)")
      return (wasInterrupted, ())
    }
  }

  @Test func oneBadKeyKeepsNoOthers() throws {
    let bench = Bench()
    let service = bench.service()
    let one = try bench.keeper(service, 1)
    let directory = bench.directory(service)
    let records = ["a", "b", "c"].map { testRecord($0) }
    for record in records { try one.publish(record, isCreateOnly: false, testCall) }
    // Neither the first one's head nor the second one's record.
    service.refuse(directory.headKey("a"))
    service.refuse(directory.holderKey(records[1]))
    let keys = try directory.store.listAll(prefix: "", testCall).entries.map(\.key)
    for key in keys { _ = service.delete(key) }
    try bench.pass(milliseconds: 2000, one)
    #expect(try directory.head("b", testCall) != nil && directory.head("c", testCall) != nil)
    #expect(try directory.allHolders(of: "a", testCall) == [records[0]])
    #expect(try directory.allHolders(of: "c", testCall) == [records[2]])
  }
}
