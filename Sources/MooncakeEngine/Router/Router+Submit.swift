import MooncakeBase
import MooncakeSystem
import Synchronization

extension Router {
  /// Waiters for more than this sleep instead of spinning, and so much is spread over all paths of
  /// a transport.
  static let bulkBytes = 1 << 20
  /// Pieces of one request at most.
  private static let pieceLimit = 1024

  /// Checks, cuts and queues `count` requests; to be called while open. Unless asynchronous, the
  /// caller will wait for the batch next and drive what carries it. `isObserved`: somebody is told
  /// of the end who neither waits nor polls.
  @inline(__always)
  package func submit(
    _ batch: Batch, count: Int, deadline: UInt64, notification: Notification?,
    isAsynchronous: Bool, isObserved: Bool, request: (Int) -> RawRequest
  ) throws(MooncakeError) {
    let first = try batch.beginSubmit(count)
    defer { batch.endSubmit() }
    var byteCount: UInt64 = 0
    var checkedSegment: SegmentID = 0
    var stretch = LocalRanges.Stretch.nothing
    for index in 0..<count {
      let raw = request(index)
      let slice = try check(raw, index, batch.tasks + (first + index), deadline)
      if raw.length > 0, !stretch.holds(raw.source, raw.length) {
        stretch = try local.ranges.find(raw.source, raw.length, request: index)
      }
      if raw.segment != checkedSegment {
        _ = try segments.segment(raw.segment)
        checkedSegment = raw.segment
      }
      batch.prepare(first + index, segment: raw.segment, slice)
      byteCount = byteCount.addingReportingOverflow(raw.length).partialValue
    }
    batch.publish(
      count,
      notification: notification.map {
        .init(segment: batch.tasks[first].segment, notification: $0, deadline: deadline)
      })
    batch.isBulk = byteCount > UInt64(Self.bulkBytes)
    dispatch(batch, first, count, isAsynchronous: isAsynchronous, isObserved: isObserved)
  }

  @inline(__always)
  private func check(
    _ raw: RawRequest, _ index: Int, _ task: UnsafeMutablePointer<TransferTask>, _ deadline: UInt64
  ) throws(MooncakeError) -> Slice {
    guard let opcode = Opcode(rawValue: raw.opcode) else {
      throw MooncakeError(
        .invalidArgument, "request \(index): opcode \(raw.opcode) is neither read nor write")
    }
    // A request of zero bytes never touches its address.
    let source = UnsafeMutableRawPointer(bitPattern: UInt(raw.source))
    if source == nil && raw.length > 0 {
      throw MooncakeError(.invalidArgument, "request \(index): the local address is null")
    }
    if raw.length > RemoteBuffer.lengthLimit
      || raw.source.addingReportingOverflow(raw.length).overflow
      || raw.targetOffset.addingReportingOverflow(raw.length).overflow
    {
      throw MooncakeError(
        .invalidArgument, "request \(index): \(raw.length) bytes wrap around the address space")
    }
    return Slice(
      task: task, local: source ?? UnsafeMutableRawPointer(task), remote: raw.targetOffset,
      length: Int(raw.length), deadline: deadline, opcode: opcode, isPooled: false)
  }

  /// Queues published tasks, in runs to the same segment.
  private func dispatch(
    _ batch: Batch, _ first: Int, _ count: Int, isAsynchronous: Bool, isObserved: Bool
  ) {
    var used = DriverSet()
    var index = first
    let end = first + count
    while index < end {
      let id = batch.tasks[index].segment
      var runEnd = index + 1
      while runEnd < end, batch.tasks[runEnd].segment == id { runEnd += 1 }
      used.formUnion(dispatch(batch, id, index..<runEnd, isAsynchronous))
      index = runEnd
    }
    batch.use(used)
    if let driver = drivers.onlyExclusive(of: batch.drivers) {
      if !isAsynchronous { return }
      if !batch.isBulk {
        // Send small requests at once; the next wait or poll continues with them.
        _ = driver.pollIfFree()
        if !batch.hasListener && !isObserved { return driver.nudge() }
      }
    }
    // All of them: a submit before may have left one to a waiter, which drives only if it is alone.
    drivers.kickExclusive(batch.drivers)
  }

  private func dispatch(
    _ batch: Batch, _ id: SegmentID, _ range: Range<Int>, _ isAsynchronous: Bool
  ) -> DriverSet {
    guard let segment = try? segments.segment(id) else {
      for index in range {
        fail(
          batch.slices + index, .failed(.invalidHandle),
          reason: "segment \(id) was closed during the submit")
      }
      return DriverSet()
    }
    let route = segment.route
    let choice = route.choose(now())
    let checksRanges = choice.map { route.ways[$0].traits.checksRanges } ?? false
    let table = self.table(of: segment, route)
    var run = SliceRun(isAsynchronous: isAsynchronous)
    for index in range {
      let slice = batch.slices + index
      if slice.pointee.length == 0 {
        Batch.end(slice, .completed)
      } else if checksRanges || table.check(slice) == .allowed {
        run.append(slice)
      } else {
        // The peer may have registered the range since its descriptor was fetched.
        recover(segment, slice)
      }
    }
    if run.isEmpty { return DriverSet() }
    return submit(segment, route, &run, on: choice)
  }

  /// What the owner of a segment has registered, as far as is known here.
  @inline(__always)
  func table(of segment: OpenSegment, _ route: SegmentRoute) -> RangeTable {
    segment.id == 0 ? local.buffers.snapshot : route.table
  }

  /// Submits a run on the chosen way, and on others what that refuses. Returns the exclusive
  /// drivers that must be kicked or driven.
  func submit(
    _ segment: OpenSegment, _ route: SegmentRoute, _ run: inout SliceRun, on choice: Int?
  ) -> DriverSet {
    guard let choice else {
      while let slice = run.popFirst() { placeLater(segment, route, slice, after: nil) }
      return DriverSet()
    }
    let way = route.ways[choice]
    if way.hasSiblings, run.byteCount > Self.bulkBytes {
      spread(route, &run, choice)
    } else {
      submitWhole(route, way, &run)
    }
    var used = run.drivers
    while let slice = run.refused.popFirst() {
      used.formUnion(place(segment, route, slice, after: nil))
    }
    return used
  }

  @inline(__always)
  private func submitWhole(
    _ route: SegmentRoute, _ way: SegmentRoute.Way, _ run: inout SliceRun
  ) {
    // No part of a range may move before all of it has been checked.
    if way.traits.checksRanges { way.path.check(&run) }
    let piece = way.traits.pieceBytes
    if piece <= run.largestBytes / 2 { cut(route, &run, piece) }
    if !run.isEmpty { way.path.submit(&run) }
    if !run.refused.isEmpty { run.markRefused(way.path.mark) }
  }

  // MARK: Several paths

  /// Spreads bulk over all paths of the chosen one's transport that work, by their weights: each
  /// piece goes where the queue is the shortest.
  private func spread(_ route: SegmentRoute, _ run: inout SliceRun, _ choice: Int) {
    let chosen = route.ways[choice]
    let name = chosen.path.transportName
    let excluded = run.first?.pointee.triedPaths ?? 0
    let ways = route.ways[choice...].filter {
      $0.path.transportName == name && excluded & $0.path.mark == 0
        && ($0.path === chosen.path || ($0.path.isUsable && route.isOpen($0)))
    }
    if ways.count == 1 { return submitWhole(route, chosen, &run) }
    if chosen.traits.checksRanges {
      chosen.path.check(&run)
      run.markRefused(chosen.path.mark)
    }
    let piece = ways.reduce(Int.max) { min($0, $1.traits.pieceBytes) }
    if piece <= run.largestBytes / 2 { cut(route, &run, piece) }
    var shares = ways.map { _ in
      SliceRun(isAsynchronous: run.isAsynchronous, isHandedOver: run.isHandedOver)
    }
    var loads = ways.map { $0.path.load }
    while let slice = run.popFirst() {
      var best = 0
      for index in 1..<ways.count
      where loads[index] / ways[index].traits.weight < loads[best] / ways[best].traits.weight {
        best = index
      }
      loads[best] += slice.pointee.length
      shares[best].append(slice)
    }
    for index in ways.indices where !shares[index].isEmpty {
      ways[index].path.submit(&shares[index])
      run.drivers.formUnion(shares[index].drivers)
      shares[index].markRefused(ways[index].path.mark)
      run.refused.append(contentsOf: &shares[index].refused)
    }
  }

  // MARK: Cutting

  /// Cuts the large slices of a run.
  private func cut(_ route: SegmentRoute, _ run: inout SliceRun, _ pieceBytes: Int) {
    var whole = run.takeSlices()
    while let slice = whole.popFirst() {
      if slice.pointee.length / 2 >= pieceBytes {
        cut(route, slice, pieceBytes, into: &run)
      } else {
        run.append(slice)
      }
    }
  }

  /// Cuts one request, so that all connections or threads share it.
  private func cut(
    _ route: SegmentRoute, _ first: SlicePointer, _ pieceBytes: Int, into run: inout SliceRun
  ) {
    let whole = first.pointee
    // What returns after a path has failed was cut before.
    if whole.isPooled || whole.wasCut { return run.append(first) }
    let piece = max(pieceBytes, (whole.length / Self.pieceLimit + 4095) & ~4095)
    let count = (whole.length + piece - 1) / piece
    whole.task.pointee.start(pieceCount: count)
    var spare = pool.take(count - 1)
    for index in 0..<count {
      let offset = index * piece
      let slice: SlicePointer
      if index == 0 {
        slice = first
      } else {
        slice = spare!
        spare = slice.pointee.next
      }
      slice.initialize(
        to: Slice(
          task: whole.task, local: whole.local + offset, remote: whole.remote + UInt64(offset),
          length: min(piece, whole.length - offset), deadline: whole.deadline,
          opcode: whole.opcode, isPooled: index > 0))
      slice.pointee.wasCut = true
      slice.pointee.attempts = whole.attempts
      slice.pointee.triedPaths = whole.triedPaths
      slice.pointee.wasSent = whole.wasSent
      slice.pointee.life = route.life
      slice.pointee.isRefetched = whole.isRefetched
      slice.pointee.remoteBuffer = whole.remoteBuffer
      run.append(slice)
    }
  }
}
