import MooncakeBase
import MooncakeSystem
import Synchronization

/// The transports of an engine, in order of preference. It only grows, since transports may be
/// attached while others work.
package final class AttachedTransports: Sendable {
  private struct Entry: Sendable {
    let transport: any Transport
    let rank: Int
    let cost: Int
  }
  private let entries = Lock<[Entry]>([])
  /// Names in order of preference. Others go before the first that costs more.
  private let preference: [String]

  package init(preference: [String]) { self.preference = preference }

  package var all: [any Transport] { entries.withLock { $0.map(\.transport) } }

  func has(_ name: String) -> Bool {
    entries.withLock { $0.contains { $0.transport.name == name } }
  }

  func add(_ transport: any Transport, cost: Int) {
    let named = preference.firstIndex(of: transport.name)
    entries.withLock { entries in
      let position =
        entries.firstIndex { entry in named.map { entry.rank > $0 } ?? (entry.cost > cost) }
        ?? entries.count
      let rank = named ?? (position == 0 ? -1 : entries[position - 1].rank)
      entries.insert(Entry(transport: transport, rank: rank, cost: cost), at: position)
    }
  }

  /// The first of a type.
  func first<Kind: Transport>() -> Kind? {
    entries.withLock { entries in
      for entry in entries { if let found = entry.transport as? Kind { return found } }
      return nil
    }
  }

  /// How many there are; grows when one is attached.
  var count: Int { entries.withLock { $0.count } }

  /// The paths of all transports to a descriptor's process, in order of preference, and why others
  /// have none. Of the `former` route to the same name, what still holds is kept. Throws if there
  /// is no path at all.
  func connect(
    to descriptor: SegmentDescriptor, former: SegmentRoute?, link: SegmentLink, deadline: Deadline
  ) throws(MooncakeError) -> SegmentRoute {
    let isSameProcess =
      former.map {
        descriptor.incarnation != 0 && descriptor.incarnation == $0.descriptor.incarnation
      } ?? false
    let known = former?.paths ?? []
    let all = all
    var paths: [any Path] = []
    var absences: [SegmentRoute.Absence] = []
    for (index, transport) in all.enumerated() {
      // One that waits for a peer must leave time to those that follow.
      let half = Deadline.after(milliseconds: deadline.remainingNanoseconds / 2_000_000)
      let end = index == all.count - 1 ? deadline : min(deadline, half)
      do throws(MooncakeError) {
        paths += try transport.connect(to: descriptor, former: known, for: link, deadline: end)
      } catch {
        let kept = known.filter { $0.transportName == transport.name }
        // A name that does not resolve now does not make connections to the process useless.
        if isSameProcess, !kept.isEmpty, error.code != .unsupported {
          paths += kept
        } else {
          absences.append(.init(transport: transport.name, error: error))
        }
      }
    }
    guard paths.isEmpty else {
      return SegmentRoute(
        descriptor: descriptor, paths: paths, absences: absences, link: link,
        gate: isSameProcess ? former?.gate : nil)
    }
    // The one that is preferred least reaches most peers: what it says matters.
    guard let last = absences.last else {
      throw MooncakeError(
        .unsupported, "segment \(descriptor.name): this engine has no transport to reach it")
    }
    let reasons = absences.map { "\($0.transport): \($0.error.message)" }
    throw MooncakeError(
      last.error.code,
      absences.count == 1
        ? "segment \(descriptor.name): \(last.error.message)"
        : "segment \(descriptor.name): no way to reach it: \(reasons.joined(separator: "; "))")
  }
}
