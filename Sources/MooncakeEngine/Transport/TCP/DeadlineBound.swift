/// A time before which no slice of an endpoint is due, so that the driver need not look at them.
struct DeadlineBound {
  private(set) var nanoseconds = UInt64.max

  @inline(__always)
  mutating func include(_ slice: SlicePointer) {
    // A batch canceled between its submit and now missed the sweep: another must come.
    let isCanceled = slice.pointee.batch.isCancelRequested
    nanoseconds = isCanceled ? 0 : min(nanoseconds, slice.pointee.deadline)
  }

  /// Nothing is due before `nanoseconds`.
  mutating func reset(to nanoseconds: UInt64 = .max) { self.nanoseconds = nanoseconds }
}
