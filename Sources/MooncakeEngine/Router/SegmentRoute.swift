import MooncakeBase
import MooncakeSystem

/// An immutable view of a peer's segment: what it publishes and the paths to it.
package final class SegmentRoute: Sendable {
  /// A path with what the router looks at before each use.
  package struct Way: Sendable {
    package let path: any Path
    package let traits: PathTraits
    /// Whether another path of the same transport follows.
    let hasSiblings: Bool
  }

  /// Why a transport has no path to the peer.
  package struct Absence: Sendable {
    package let transport: String
    package let error: MooncakeError
  }

  package let descriptor: SegmentDescriptor
  package let table: RangeTable
  /// Tells the lives of the peer's process apart; 0 if the peer does not.
  let life: UInt32
  /// In order of preference.
  package let ways: [Way]
  package let absences: [Absence]
  /// What the paths report to.
  package let link: SegmentLink
  /// Where the peer's process may still store earlier writes.
  package let gate: WriteGate

  package init(
    descriptor: SegmentDescriptor, paths: [any Path], absences: [Absence] = [],
    link: SegmentLink? = nil, gate known: WriteGate? = nil
  ) {
    self.descriptor = descriptor
    self.link = link ?? SegmentLink(descriptor.name, nil)
    self.absences = absences
    table = RangeTable(descriptor.buffers)
    let incarnation = descriptor.incarnation
    life =
      incarnation == 0
      ? 0 : max(1, UInt32(truncatingIfNeeded: incarnation ^ incarnation >> 32))
    ways = paths.indices.map { index in
      var traits = paths[index].traits
      traits.weight = max(1, traits.weight)
      return Way(
        path: paths[index], traits: traits,
        hasSiblings: paths[(index + 1)...].contains {
          $0.transportName == paths[index].transportName
        })
    }
    gate = paths.lazy.compactMap(\.gate).first ?? known ?? WriteGate()
  }

  package var paths: [any Path] { ways.map(\.path) }

  /// The first way in order of preference that slices may take now, not counting those in
  /// `excluded`: one that works, or else one whose peer is worth waiting for. nil if there is none.
  @inline(__always)
  package func choose(
    excluding excluded: UInt64 = 0, _ now: @autoclosure () -> UInt64 = Clock.now()
  ) -> Int? {
    if let first = ways.first, excluded == 0, first.path.isUsable, isOpen(first) { return 0 }
    return chooseAnother(excluded, now())
  }

  /// Writes of a broken path must land before anything new, and not every path waits for that.
  @inline(__always)
  func isOpen(_ way: Way) -> Bool { way.traits.waitsForFences || gate.isEmpty }

  private func chooseAnother(_ excluded: UInt64, _ now: UInt64) -> Int? {
    for (index, way) in ways.enumerated() {
      let isCandidate = excluded & way.path.mark == 0 && isOpen(way)
      if way.path.isUsable {
        if isCandidate { return index }
        continue
      }
      way.path.retryIfDue(now)
      // One run finds out whether the path works again.
      if isCandidate, way.path.mayProbe(now) { return index }
    }
    return ways.firstIndex {
      $0.traits.waitsForPeer && excluded & $0.path.mark == 0 && isOpen($0)
    }
  }

  func has(_ mark: UInt64) -> Bool { ways.contains { $0.path.mark == mark } }

  /// Whether another way works, for slices that leave one.
  func hasUsable(excluding excluded: UInt64, _ now: UInt64) -> Bool {
    ways.contains { way in
      if way.path.isUsable { return excluded & way.path.mark == 0 && isOpen(way) }
      way.path.retryIfDue(now)
      return false
    }
  }

  /// Why the paths do not lead to the peer, and the transports without one that might have; texts
  /// that `known` contains are left out.
  package func describeFailures(besides known: String = "") -> String {
    let failed = ways.compactMap { way in
      way.path.health.failure.map { (way.path.transportName, $0) }
    }
    let absent = absences.compactMap { absence in
      absence.error.code == .unsupported ? nil : (absence.transport, absence.error.message)
    }
    return (failed + absent).filter { !known.contains($0.1) }.map { "\($0.0): \($0.1)" }
      .joined(separator: "; ")
  }
}
