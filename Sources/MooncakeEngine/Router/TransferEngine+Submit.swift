import MooncakeBase
import MooncakeSystem
import Synchronization

/// How requests are cut and spread over connections.
private enum Striping {
  /// Smaller requests are chained, for few pushes and gathered sends.
  static let smallBytes = 64 << 10
  /// Bytes of small requests that go to one connection before the next is chosen: moving less is
  /// faster than waking another thread.
  static let chainBytes = 1 << 20
  /// Larger requests are cut, so that all connections share one request.
  static let stripeBytes = 1 << 20
  static let stripeCountLimit = 1024
  /// Waiters for more than this sleep instead of spinning.
  static let bulkBytes = 1 << 20
}

extension TransferEngine {
  /// Checks, cuts and queues `count` requests. Unless asynchronous, the caller will wait for the
  /// batch next and drive the loop itself.
  @inline(__always)
  package func submit(
    _ batch: Batch, count: Int, timeoutMilliseconds: UInt64, notification: Notification?,
    isAsynchronous: Bool, request: (Int) -> RawRequest
  ) throws(MooncakeError) {
    guard count > 0 else {
      if count == 0 && notification == nil { return }
      throw MooncakeError(.invalidArgument, "there is no request to submit")
    }
    if let notification {
      try notification.validate()
      try workers.reserve()
    }
    try whileOpen { () throws(MooncakeError) in
      let deadline = deadline(timeoutMilliseconds).nanoseconds
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
      batch.isBulk = byteCount > UInt64(Striping.bulkBytes)
      dispatch(batch, first, count, isAsynchronous: isAsynchronous)
    }
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
  private func dispatch(_ batch: Batch, _ first: Int, _ count: Int, isAsynchronous: Bool) {
    var dispatcher = Dispatcher(engine: self, isAsynchronous: isAsynchronous)
    var index = first
    let end = first + count
    while index < end {
      let id = batch.tasks[index].segment
      var runEnd = index + 1
      while runEnd < end, batch.tasks[runEnd].segment == id { runEnd += 1 }
      dispatcher.dispatch(batch, id, index..<runEnd)
      index = runEnd
    }
    batch.use(dispatcher.used)
    if let driver = drivers.onlyExclusive(of: batch.drivers) {
      if !isAsynchronous { return }
      if !batch.isBulk {
        // Send small requests at once; the next wait or poll continues with them.
        _ = driver.pollIfFree()
        if !batch.hasListener && engineEvent.load(ordering: .relaxed) < 0 { return driver.nudge() }
      }
    }
    // All of them: a submit before may have left one to a waiter, which drives only if it is alone.
    drivers.kickExclusive(batch.drivers)
  }
}

/// Spreads the slices of one submit over connections.
private struct Dispatcher {
  private let engine: TransferEngine
  private let isAsynchronous: Bool
  private(set) var used = DriverSet()

  init(engine: TransferEngine, isAsynchronous: Bool) {
    self.engine = engine
    self.isAsynchronous = isAsynchronous
  }

  mutating func dispatch(_ batch: Batch, _ id: SegmentID, _ range: Range<Int>) {
    guard let segment = try? engine.segments.segment(id) else {
      for index in range {
        Batch.end(
          batch.slices + index, .failed(.invalidHandle),
          reason: "segment \(id) was closed during the submit")
      }
      return
    }
    let route = segment.route
    if let shared = engine.sharedMemory {
      if let peer = route.sharedMemory, peer.isUsable {
        // Writes of a broken connection must land before anything new, and only TCP waits for that.
        if route.connections.peer.unfenced.isEmpty {
          var rest = copy(batch, range, peer, shared)
          if !rest.isEmpty { send(segment, route) { rest.popFirst() } }
          return
        }
      } else if route.sharedMemoryHealth.isDue {
        engine.retrySharedMemory(segment, route)
      }
    }
    var index = range.lowerBound
    send(segment, route) {
      if index == range.upperBound { return nil }
      defer { index += 1 }
      return batch.slices + index
    }
  }

  /// Sends the slices that `next` yields over TCP.
  @inline(__always)
  private mutating func send(
    _ segment: OpenSegment, _ route: SegmentRoute, next: () -> SlicePointer?
  ) {
    let table = segment.id == 0 ? engine.local.buffers.snapshot : route.table
    let connections = route.connections
    var chain = SliceQueue()
    var chainBytes = 0
    while let slice = next() {
      let length = slice.pointee.length
      if length == 0 {
        Batch.end(slice, .completed)
        continue
      }
      let verdict = table.check(
        slice.pointee.remote, UInt64(length), slice.pointee.opcode.requiredAccess)
      if verdict != .allowed {
        // The peer may have registered the range since its descriptor was fetched.
        engine.recover(segment, slice)
        continue
      }
      if length < Striping.smallBytes || connections.peer.isOneShot {
        chain.append(slice)
        chainBytes += length
        if chainBytes >= Striping.chainBytes { push(&chain, &chainBytes, connections) }
      } else if length < 2 * Striping.stripeBytes {
        var single = SliceQueue()
        single.append(slice)
        var byteCount = length
        push(&single, &byteCount, connections)
      } else {
        var pieces = cut(slice)
        while let piece = pieces.popFirst() {
          var queue = SliceQueue()
          queue.append(piece)
          var byteCount = piece.pointee.length
          push(&queue, &byteCount, connections)
        }
      }
    }
    push(&chain, &chainBytes, connections)
  }

  /// Copies slices through shared memory, now or queued; returns those that must go over TCP.
  private mutating func copy(
    _ batch: Batch, _ range: Range<Int>, _ peer: SharedMemoryPeer, _ shared: SharedMemoryTransport
  ) -> SliceQueue {
    var byteCount = 0
    for index in range {
      byteCount = byteCount.addingReportingOverflow(batch.slices[index].length).partialValue
    }
    var index = range.lowerBound
    func next() -> SlicePointer? {
      while index < range.upperBound {
        defer { index += 1 }
        let slice = batch.slices + index
        if slice.pointee.length > 0 { return slice }
        Batch.end(slice, .completed)
      }
      return nil
    }
    // If the sum overflows, one request is larger than memory and is refused below.
    if byteCount < 0 || byteCount <= SharedMemoryTransport.inlineBytes {
      return shared.copy(peer, totalBytes: byteCount, next: next)
    }
    var queue = SliceQueue()
    var refused = SliceQueue()
    let view = peer.currentView()
    while let slice = next() {
      if !peer.grants(slice, view) {
        // No part of a range may move before all of it has been checked.
        refused.append(slice)
      } else if slice.pointee.length < 2 * Striping.stripeBytes {
        queue.append(slice)
      } else {
        var pieces = cut(slice)
        queue.append(contentsOf: &pieces)
      }
    }
    if queue.isEmpty { return refused }
    // First, so that a thread which waits already sees what it can help with.
    batch.use(DriverSet(bit: shared.driverBit))
    shared.enqueue(peer, queue, byteCount: byteCount, isAsynchronous: isAsynchronous)
    return refused
  }

  private mutating func push(
    _ queue: inout SliceQueue, _ byteCount: inout Int, _ connections: TCPConnectionGroup
  ) {
    if queue.isEmpty { return }
    let endpoint = connections.leastBusy()
    endpoint.push(queue, byteCount: byteCount)
    used.insert(endpoint.loop.driverBit)
    queue = SliceQueue()
    byteCount = 0
  }

  /// Cuts a large request into slices for all connections or threads.
  private func cut(_ first: SlicePointer) -> SliceQueue {
    let whole = first.pointee
    let piece = max(
      Striping.stripeBytes, (whole.length / Striping.stripeCountLimit + 4095) & ~4095)
    let count = (whole.length + piece - 1) / piece
    whole.task.pointee.start(sliceCount: count)
    var spare = engine.pool.take(count - 1)
    var pieces = SliceQueue()
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
      pieces.append(slice)
    }
    return pieces
  }
}
