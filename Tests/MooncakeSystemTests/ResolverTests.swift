import CLinux
import MooncakeSystem
import Synchronization
import Testing

@Suite(.serialized) struct ResolverTests {
  @Test(arguments: ["127.0.0.1", "::1", "10.0.0.5"])
  func numericNeedsNoLookup(host: String) throws {
    // A passed deadline shows that nothing was waited for.
    let addresses = try Resolver.resolve(
      host, port: 7, deadline: Deadline(nanoseconds: 1))
    #expect(addresses.map(\.host) == [host])
    #expect(addresses[0].port == 7)
  }

  @Test func localhostIsLoopback() throws {
    let addresses = try Resolver.resolve(
      "localhost", port: 80, deadline: .after(milliseconds: 5000))
    #expect(!addresses.isEmpty)
    #expect(addresses.allSatisfy { $0.isLoopback && $0.port == 80 })
  }

  @Test func unknownNameSaysWhy() {
    do throws(ResolveError) {
      _ = try Resolver.resolve(
        "no-such-host.invalid", port: 1, deadline: .after(milliseconds: 10_000))
      Issue.record("resolved")
    } catch {
      #expect(!error.description.isEmpty)
    }
  }

  @Test func hangingLookupEndsAtTheDeadlineAndItsSlotComesBack() throws {
    let gate = Gate()
    let start = Clock.now()
    // More callers than slots: none waits beyond its deadline, and no more threads than slots run.
    for _ in 0..<(Resolver.maximumLookups + 4) {
      do throws(ResolveError) {
        _ = try Resolver.resolve(
          "slow.example", port: 1, deadline: .after(milliseconds: 20)
        ) { _, _ in
          gate.enter()
          return .failure(ResolveError(isTimeout: false, description: "late"))
        }
        Issue.record("resolved")
      } catch {
        #expect(error.isTimeout)
      }
    }
    #expect(gate.entered <= Resolver.maximumLookups)
    #expect(Clock.now() - start < 5_000_000_000)
    gate.open()
    let addresses = try Resolver.resolve(
      "localhost", port: 1, deadline: .after(milliseconds: 5000))
    #expect(!addresses.isEmpty)
  }

  @Test func hangingLookupEndsWhenItIsCanceled() throws {
    let gate = Gate()
    let cancellation = try EventFD()
    let thread = try WorkerThread.start(name: "cancel") {
      while gate.entered == 0 { sleepBriefly(nanoseconds: 1_000_000) }
      cancellation.signal()
    }
    let start = Clock.now()
    do throws(ResolveError) {
      _ = try Resolver.resolve(
        "slow.example", port: 1, deadline: .after(milliseconds: 20_000),
        cancellation: cancellation.descriptor.rawValue
      ) { _, _ in
        gate.enter()
        return .failure(ResolveError(isTimeout: false, description: "late"))
      }
      Issue.record("resolved")
    } catch {
      #expect(error.isCanceled && !error.isTimeout)
    }
    #expect(Clock.now() - start < 5_000_000_000)
    gate.open()
    thread.join()
  }

  @Test func lookupResultIsHandedOver() throws {
    let expected = [SocketAddress(numeric: "10.1.2.3", port: 9)!]
    let addresses = try Resolver.resolve(
      "name.example", port: 9, deadline: .after(milliseconds: 5000)
    ) { host, port in
      host == "name.example" && port == 9
        ? .success(expected) : .failure(ResolveError(isTimeout: false, description: "?"))
    }
    #expect(addresses == expected)
  }
}

/// Holds threads until it is opened.
private final class Gate: Sendable {
  private let state = Futex(0)
  private let count = Atomic(0)

  var entered: Int { count.load(ordering: .acquiring) }

  func enter() {
    count.wrappingAdd(1, ordering: .acquiringAndReleasing)
    while state.value == 0 { state.wait(while: 0, until: .after(milliseconds: 10_000)) }
  }

  func open() {
    state.store(1)
    state.wakeAll()
  }
}
