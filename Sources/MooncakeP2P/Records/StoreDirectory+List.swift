import MooncakeBase
import MooncakeEngine
import MooncakeMetadata

extension StoreDirectory {
  /// Every payload whose name begins with `start`, in order of names. A name without a head is
  /// listed with the newest version that a holder has all of.
  package func list(
    prefix start: String, _ call: Call
  ) throws(MooncakeError) -> [PayloadInfo] {
    // By bytes: equal strings may be different names.
    var infos: [MetadataKey: PayloadInfo] = [:]
    try store.forEach(prefix: headKey(start), call) { entry throws(MooncakeError) in
      guard let head = head(name(ofHead: entry.key), in: entry.value) else { return }
      infos[MetadataKey(head.name)] = head.summary.info(holderCount: 0)
    }
    var headless: [MetadataKey: [HeldVersion]] = [:]
    try store.forEach(prefix: holderKeys(startingWith: start), call) {
      entry throws(MooncakeError) in
      guard let record = record(entry) else { return }
      let key = MetadataKey(record.name)
      if infos[key] == nil {
        Self.note(record, &headless[key, default: []])
      } else if infos[key]?.version == record.version {
        infos[key]?.holderCount += 1
      }
    }
    if !headless.isEmpty {
      // Holders of a removed name may not have noticed yet.
      let removals = try removals(startingWith: start, call) { headless[$0] != nil }
      for (key, versions) in headless {
        guard let newest = Self.listed(versions, removals[key] ?? Removals()) else { continue }
        infos[key] = newest.summary.info(holderCount: newest.holderCount)
      }
    }
    return infos.sorted { $0.key < $1.key }.map(\.value)
  }

  /// Above this many names, walking through all records is less work than asking for each.
  private static let singleCount = 16

  /// How some names that begin with `start` are listed, by name, and the removals of those without
  /// a head.
  func lookUp(
    _ names: [MetadataKey], startingWith start: String, _ call: Call
  ) throws(MooncakeError) -> (listed: [MetadataKey: PayloadSummary], [MetadataKey: Removals]) {
    var listed: [MetadataKey: PayloadSummary] = [:]
    var removals: [MetadataKey: Removals] = [:]
    if names.count <= Self.singleCount {
      for name in names {
        listed[name] = try head(of: name, call)
        if listed[name] != nil { continue }
        let versions = try versions(of: name.text, call)
        removals[name] = try self.removals(of: name.text, call)
        listed[name] = Self.listed(versions, removals[name]!)?.summary
      }
      return (listed, removals)
    }
    let asked = Set(names)
    var held: [MetadataKey: [HeldVersion]] = [:]
    try store.forEach(prefix: holderKeys(startingWith: start), call) {
      entry throws(MooncakeError) in
      guard let record = record(entry) else { return }
      let name = MetadataKey(record.name)
      if asked.contains(name) { Self.note(record, &held[name, default: []]) }
    }
    removals = try self.removals(startingWith: start, call) { asked.contains($0) }
    for (name, versions) in held {
      listed[name] = Self.listed(versions, removals[name] ?? Removals())?.summary
    }
    // They may have a head by now.
    let rest = names.filter { listed[$0] == nil }
    let texts = try store.values(of: rest.map { headKey($0.text) }, call)
    for (name, text) in zip(rest, texts) { listed[name] = head(name.text, in: text)?.summary }
    return (listed, removals)
  }

  private func head(
    of name: MetadataKey, _ call: Call
  ) throws(MooncakeError) -> PayloadSummary? {
    head(name.text, in: try store.values(of: [headKey(name.text)], call)[0])?.summary
  }
}
